// Error codes and messages of the C interface.
#pragma once

#include <string>

#include "acl/acl.h"
#include "acl/error_codes/rt_error_codes.h"
#include "runtime/acl/task.h"

namespace host_runtime {

/// fail(ACL_ERROR_INVALID_PARAM, ...) for an argument that must not be null.
aclError fail_null(const char* function, const char* argument);

/// Runs `body` (returning aclError) and turns exceptions into codes, so that none crosses the C interface.
template <typename Body>
aclError guarded(const char* function, Body body) noexcept;

aclError fail_exception(const char* function, const std::exception& error) noexcept;

template <typename Body>
aclError guarded(const char* function, Body body) noexcept {
  try {
    return body();
  } catch (const TaskError& error) {
    return fail(error.code, std::string(function) + ": " + error.what());
  } catch (const std::exception& error) {
    return fail_exception(function, error);
  }
}

}  // namespace host_runtime
