// Host functions in streams.
#include "runtime/acl/capture.h"
#include "runtime/acl/stream.h"

namespace host_runtime {
namespace {

class HostFunctionTask final : public Task {
 public:
  HostFunctionTask(void (*function)(void*), void* argument, const char* name)
      : function_(function), argument_(argument), name_(name) {}
  void run() override { function_(argument_); }
  std::string name() const override { return name_; }

 private:
  void (*function_)(void*);
  void* argument_;
  const char* name_;
};

aclError launch(aclrtStream handle, void (*function)(void*), void* argument, const char* name) {
  return guarded(name, [&] {
    if (function == nullptr) return fail_null(name, "fn");
    const auto stream = find_stream(handle, name);
    if (!stream) return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
    return submit_to(*stream, std::make_shared<HostFunctionTask>(function, argument, name));
  });
}

}  // namespace
}  // namespace host_runtime

using namespace host_runtime;

aclError aclrtLaunchCallback(aclrtCallback fn, void* userData, aclrtCallbackBlockType, aclrtStream stream) {
  return launch(stream, fn, userData, "aclrtLaunchCallback");
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc fn, void* args) {
  return launch(stream, fn, args, "aclrtLaunchHostFunc");
}

// Callbacks run on their stream's thread, so no thread has to be subscribed to serve them; asking is allowed.
aclError aclrtSubscribeReport(uint64_t, aclrtStream stream) {
  return find_stream(stream, "aclrtSubscribeReport") ? ACL_SUCCESS
                                                     : aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
}

aclError aclrtUnSubscribeReport(uint64_t, aclrtStream stream) {
  return find_stream(stream, "aclrtUnSubscribeReport") ? ACL_SUCCESS
                                                       : aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
}

aclError aclrtProcessReport(int32_t timeout) {
  // Nothing ever arrives here; a thread that polls in a loop must not spin.
  if (timeout > 0) std::this_thread::sleep_for(std::chrono::milliseconds(std::min(timeout, 100)));
  return ACL_ERROR_WAIT_CALLBACK_TIMEOUT;
}
