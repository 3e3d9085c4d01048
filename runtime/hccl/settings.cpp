#include "runtime/hccl/settings.h"

#include <cerrno>
#include <cstdlib>
#include <string>

#include "runtime/hccl/errors.h"

namespace host_runtime::hccl {
namespace {

/// The integer in the environment variable `name`, or `otherwise` when it is not set.
long long integer(const char* name, long long low, long long high, long long otherwise,
                  const char* unit = "seconds") {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text, &end, 10);
  if (errno == 0 && *end == '\0' && value >= low && value <= high) return value;
  throw Error(HCCL_E_PARA, std::string(name) + "=" + text + " is not an integer from " + std::to_string(low) +
                               " to " + std::to_string(high) + " (" + unit + ")");
}

}  // namespace

std::chrono::seconds connect_timeout() {
  constexpr long long kNotice = 20;
  const long long documented = integer("HCCL_CONNECT_TIMEOUT", 120, 7200, 120);
  return std::chrono::seconds(integer("NPU_COMPILER_HCCL_CONNECT_SECONDS", 1, 1 << 30, documented + kNotice));
}

std::chrono::seconds exec_timeout() {
  return std::chrono::seconds(integer("HCCL_EXEC_TIMEOUT", 0, 2147483647, 1836));
}

uint64_t buffer_bytes() {
  return static_cast<uint64_t>(integer("HCCL_BUFFSIZE", 1, 1 << 30, 200, "MiB")) << 20;
}

}  // namespace host_runtime::hccl
