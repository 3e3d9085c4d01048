// Errors of libhccl: Error while a communicator is made (returned as an HcclResult), host_runtime::TaskError
// when a collective fails on its stream.
#pragma once

#include <stdexcept>
#include <string>

#include "hccl/hccl.h"
#include "runtime/acl/task.h"

namespace host_runtime::hccl {

class Error : public std::runtime_error {
 public:
  Error(HcclResult code, const std::string& what) : std::runtime_error(what), code(code) {}
  HcclResult code;
};

/// Sets the message that aclGetRecentErrMsg returns and gives `code` back.
HcclResult refuse(HcclResult code, const std::string& message);

/// Runs the body of a C entry point; exceptions become its result and the recent error message.
template <class Body>
HcclResult guarded(const char* entry, Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    return refuse(error.code, std::string(entry) + ": " + error.what());
  } catch (const std::bad_alloc&) {
    return refuse(HCCL_E_MEMORY, std::string(entry) + ": out of host memory");
  } catch (const std::exception& error) {
    return refuse(HCCL_E_INTERNAL, std::string(entry) + ": " + error.what());
  }
}

}  // namespace host_runtime::hccl
