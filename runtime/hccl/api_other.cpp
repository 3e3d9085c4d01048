// Configuration and error texts, and the entry points of what shared memory on one machine does not have.
#include <atomic>

#include "runtime/hccl/errors.h"

#define HCCL_API extern "C" __attribute__((visibility("default")))

namespace host_runtime::hccl {
namespace {

std::atomic<int32_t>& deterministic() {
  static std::atomic<int32_t> value{0};
  return value;
}

HcclResult absent(const char* name, const char* what) {
  return refuse(HCCL_E_NOT_SUPPORT, std::string(name) + ": the host runtime has no " + what);
}

}  // namespace
}  // namespace host_runtime::hccl

using namespace host_runtime::hccl;

// Reductions are deterministic here in any case; the setting is kept so that it reads back.
HCCL_API HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue configValue) {
  if (config != HCCL_DETERMINISTIC || configValue.value < 0 || configValue.value > 2) {
    return refuse(HCCL_E_PARA, "HcclSetConfig: only HCCL_DETERMINISTIC can be set, to 0, 1 or 2");
  }
  deterministic().store(configValue.value);
  return HCCL_SUCCESS;
}

HCCL_API HcclResult HcclGetConfig(HcclConfig config, HcclConfigValue* configValue) {
  if (configValue == nullptr) return refuse(HCCL_E_PTR, "HcclGetConfig: configValue is a null pointer");
  if (config != HCCL_DETERMINISTIC)
    return refuse(HCCL_E_PARA, "HcclGetConfig: only HCCL_DETERMINISTIC can be read");
  configValue->value = deterministic().load();
  return HCCL_SUCCESS;
}

HCCL_API uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }

HCCL_API const char* HcclGetErrorString(HcclResult code) {
  static const char* const texts[] = {"no error",
                                      "parameter error",
                                      "empty pointer",
                                      "memory error",
                                      "internal error",
                                      "not supported",
                                      "resource not found",
                                      "resource unavailable",
                                      "system call error",
                                      "timeout",
                                      "cannot open file",
                                      "TCP connect failure",
                                      "RoCE connect error",
                                      "TCP transfer error",
                                      "RoCE transfer error",
                                      "runtime error",
                                      "driver error",
                                      "profiling error",
                                      "CCE error",
                                      "network error",
                                      "try again",
                                      "remote rank failure",
                                      "communicator suspended",
                                      "retry failed",
                                      "out of memory"};
  constexpr size_t known = sizeof(texts) / sizeof(texts[0]);
  return static_cast<size_t>(code) < known ? texts[code] : "unknown error";
}

HCCL_API HcclResult HcclCommSuspend(HcclComm) { return absent("HcclCommSuspend", "suspended communicators"); }

HCCL_API HcclResult HcclCommResume(HcclComm) { return absent("HcclCommResume", "suspended communicators"); }

HCCL_API HcclResult HcclCommWorkingDevNicSet(HcclComm, uint32_t*, bool*, uint32_t) {
  return absent("HcclCommWorkingDevNicSet", "network cards to switch between");
}

HCCL_API HcclResult HcclCommSetMemoryRange(HcclComm, void*, size_t, size_t, uint64_t) {
  return absent("HcclCommSetMemoryRange", "zero-copy collectives; unset HCCL_ZERO_COPY");
}

HCCL_API HcclResult HcclCommUnsetMemoryRange(HcclComm, void*) {
  return absent("HcclCommUnsetMemoryRange", "zero-copy collectives; unset HCCL_ZERO_COPY");
}

HCCL_API HcclResult HcclCommActivateCommMemory(HcclComm, void*, size_t, size_t, aclrtDrvMemHandle, uint64_t) {
  return absent("HcclCommActivateCommMemory", "zero-copy collectives; unset HCCL_ZERO_COPY");
}

HCCL_API HcclResult HcclCommDeactivateCommMemory(HcclComm, void*) {
  return absent("HcclCommDeactivateCommMemory", "zero-copy collectives; unset HCCL_ZERO_COPY");
}

HCCL_API HcclResult HcclCommRegister(HcclComm, void*, uint64_t, void**, uint32_t) {
  return absent("HcclCommRegister", "registered window memory");
}

HCCL_API HcclResult HcclCommDeregister(HcclComm, void*) {
  return absent("HcclCommDeregister", "registered window memory");
}

HCCL_API HcclResult HcclCommExchangeMem(HcclComm, void*, uint32_t*, uint32_t) {
  return absent("HcclCommExchangeMem", "registered window memory");
}
