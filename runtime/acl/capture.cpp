#include "runtime/acl/capture.h"

namespace host_runtime {

aclError submit_to(Stream& stream, TaskPtr task) { return stream.enqueue(std::move(task)); }
aclError refuse_capturing(const Stream&, const char*) { return ACL_SUCCESS; }
aclError refuse_unsafe(const char*) { return ACL_SUCCESS; }
aclError refuse_staged_copy(const Stream&, const char*) { return ACL_SUCCESS; }
aclError refuse_device_wait(const Device&, const char*) { return ACL_SUCCESS; }

}  // namespace host_runtime
#include "runtime/acl/event.h"
namespace host_runtime {
aclError refuse_captured_event(const Event&, const char*) { return ACL_SUCCESS; }
aclError submit_event_task(Stream& stream, const std::shared_ptr<Event>& event, EventTask::Action action,
                           const char*) {
  uint64_t record =
      action == EventTask::Action::kRecord ? event->announce_record() : event->state->recorded.load();
  return stream.enqueue(std::make_shared<EventTask>(event, action, record));
}
}  // namespace host_runtime
