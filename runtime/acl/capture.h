// Graph capture: where tasks go instead of their stream's queue.
#pragma once

#include <mutex>

#include "runtime/acl/stream.h"

namespace host_runtime {

class Capture {};
struct GroupUpdate {};

/// Queues, records or collects `task`, whichever `stream` is set to.
aclError submit_to(Stream& stream, TaskPtr task);

/// Error (set) when the host may not wait for or ask about `stream` because it is being captured.
aclError refuse_capturing(const Stream& stream, const char* function);
/// Error (set) when a capture forbids calls that are unsafe during capture on this thread.
aclError refuse_unsafe(const char* function);
/// Error (set) for an asynchronous copy from or to memory that is not pinned on a stream that is being
/// captured.
aclError refuse_staged_copy(const Stream& stream, const char* function);
/// As refuse_unsafe for whole devices.
aclError refuse_device_wait(const Device& device, const char* function);

}  // namespace host_runtime
