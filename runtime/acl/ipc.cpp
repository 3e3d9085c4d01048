#include "runtime/acl/event.h"
namespace host_runtime {
aclError create_ipc_event(aclrtEvent*, uint32_t) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "IPC events");
}
}  // namespace host_runtime
