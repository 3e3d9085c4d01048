// What the native tests of libascendcl need: a check that reports and counts, and tasks that do what a test
// wants.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>

#include "acl/acl.h"
#include "acl/error_codes/rt_error_codes.h"
#include "runtime/acl/task.h"

extern "C" size_t hostRuntimeCounters(const char** names, uint64_t* values, size_t capacity);

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)

#define CHECK_CODE(call, expected)                                                                       \
  do {                                                                                                   \
    const aclError code_ = (call);                                                                       \
    if (code_ != (expected)) {                                                                           \
      const char* message_ = aclGetRecentErrMsg();                                                       \
      std::fprintf(stderr, "%s:%d: %s returned %d, expected %d: %s\n", __FILE__, __LINE__, #call, code_, \
                   expected, message_ == nullptr ? "" : message_);                                       \
      std::exit(1);                                                                                      \
    }                                                                                                    \
  } while (false)

#define CHECK_OK(call) CHECK_CODE(call, ACL_SUCCESS)

inline bool message_has(const std::string& part) {
  const char* message = aclGetRecentErrMsg();
  const bool found = message != nullptr && std::string(message).find(part) != std::string::npos;
  if (!found)
    std::fprintf(stderr, "message without '%s': %s\n", part.c_str(), message == nullptr ? "" : message);
  return found;
}

/// An operator in the eyes of the runtime: its name begins with "aclnn".
class Operator final : public host_runtime::Task {
 public:
  explicit Operator(std::function<void()> body, std::string name = "aclnnTest",
                    std::vector<host_runtime::MemoryAccess> accesses = {})
      : body_(std::move(body)), name_(std::move(name)), accesses_(std::move(accesses)) {}
  void run() override { body_(); }
  std::string name() const override { return name_; }
  std::vector<host_runtime::MemoryAccess> accesses() const override { return accesses_; }

 private:
  std::function<void()> body_;
  std::string name_;
  std::vector<host_runtime::MemoryAccess> accesses_;
};

inline aclError launch(aclrtStream stream, std::function<void()> body,
                       const std::string& name = "aclnnTest") {
  return host_runtime::submit(stream, std::make_shared<Operator>(std::move(body), name));
}

inline uint64_t counter(const std::string& wanted) {
  const char* names[32];
  uint64_t values[32];
  const size_t size = hostRuntimeCounters(names, values, 32);
  for (size_t i = 0; i < size; ++i) {
    if (wanted == names[i]) return values[i];
  }
  std::fprintf(stderr, "no counter %s\n", wanted.c_str());
  std::exit(1);
}

struct TestCase {
  const char* name;
  void (*body)();
};
