#include "runtime/acl/error.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace host_runtime {
namespace {

// aclGetRecentErrMsg hands out a pointer that stays valid until the thread's next call of it.
struct ThreadErrors {
  std::string message;
  std::string handed_out;
  aclError last = ACL_SUCCESS;
};

thread_local ThreadErrors* errors_of_thread = nullptr;
thread_local bool thread_is_ending = false;

struct ThreadErrorsOwner {
  ~ThreadErrorsOwner() {
    thread_is_ending = true;
    delete errors_of_thread;
    errors_of_thread = nullptr;
  }
};

ThreadErrors& thread_errors() {
  if (errors_of_thread == nullptr) {
    // Destructors of other thread-local objects may still fail after this one's; what they say is kept, and
    // leaked.
    if (!thread_is_ending) {
      static thread_local ThreadErrorsOwner owner;
      (void)owner;
    }
    errors_of_thread = new ThreadErrors;
  }
  return *errors_of_thread;
}

}  // namespace

aclError fail(aclError code, const std::string& message) {
  ThreadErrors& errors = thread_errors();
  errors.message = "[host runtime] " + message + " (error " + std::to_string(code) + ")";
  errors.last = code;
  return code;
}

aclError fail_null(const char* function, const char* argument) {
  return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": " + argument + " is null");
}

aclError fail_exception(const char* function, const std::exception& error) noexcept {
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) {
    return fail(ACL_ERROR_BAD_ALLOC, std::string(function) + ": the host is out of memory");
  }
  return fail(ACL_ERROR_INTERNAL_ERROR, std::string(function) + ": " + error.what());
}

}  // namespace host_runtime

using host_runtime::thread_errors;

const char* aclGetRecentErrMsg() {
  auto& errors = thread_errors();
  if (errors.message.empty()) return nullptr;
  errors.handed_out = std::move(errors.message);
  errors.message.clear();
  return errors.handed_out.c_str();
}

aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return thread_errors().last; }

aclError aclrtGetLastError(aclrtLastErrLevel) {
  const aclError last = thread_errors().last;
  thread_errors().last = ACL_SUCCESS;
  return last;
}

void aclAppLog(aclLogLevel level, const char* function, const char* file, uint32_t line, const char* format,
               ...) {
  // CANN's own variables: what reaches standard error, and from which level on (default: errors, to files
  // only).
  static const bool to_stdout = [] {
    const char* value = std::getenv("ASCEND_SLOG_PRINT_TO_STDOUT");
    return value != nullptr && value[0] == '1';
  }();
  static const int threshold = [] {
    const char* value = std::getenv("ASCEND_GLOBAL_LOG_LEVEL");
    return value == nullptr ? int{ACL_ERROR} : std::atoi(value);
  }();
  if (!to_stdout || level < threshold || format == nullptr) return;
  static const char* const names[] = {"DEBUG", "INFO", "WARNING", "ERROR"};
  char text[2048];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "[%s] %s:%u %s: %s\n", names[level & 3], file == nullptr ? "?" : file, line,
               function == nullptr ? "?" : function, text);
}
