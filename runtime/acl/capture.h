// Graph capture: where tasks go instead of their stream's queue.
#pragma once

#include <mutex>
#include <thread>

#include "runtime/acl/event.h"
#include "runtime/acl/graph.h"
#include "runtime/acl/stream.h"

namespace host_runtime {

/// A capture in progress. Everything in it is guarded by capture_mutex().
class Capture {
 public:
  /// A stream that takes part, with what it has seen of the others: clock[i] is the number of tasks of stream
  /// i that come before its next task.
  struct Member {
    std::shared_ptr<Stream> stream;
    std::vector<uint64_t> clock;
    std::shared_ptr<TaskGroup> open_group;
  };

  Capture(std::shared_ptr<Graph> graph, aclmdlRICaptureMode mode)
      : graph(std::move(graph)), mode(mode), thread(std::this_thread::get_id()) {}

  Member* member_of(const Stream& stream);
  /// Null, with the error set and the capture invalidated, when no stream is left.
  Member* join(const std::shared_ptr<Stream>& stream);
  Node* record(Member& member, TaskPtr task, aclmdlRITaskType type);
  bool unjoined(std::string* which) const;

  const std::shared_ptr<Graph> graph;
  const aclmdlRICaptureMode mode;
  const std::thread::id thread;
  std::deque<Member> members;  ///< the first is the stream the capture began on
  std::string invalid;         ///< why the capture cannot succeed any more; empty while it can
  bool active = true;
  uint32_t label = 0;  ///< of the tasks to come (trace.h)

 private:
  static uint64_t& at(std::vector<uint64_t>& clock, size_t index);
};

std::mutex& capture_mutex();

/// Queues, records or collects `task`, whichever `stream` is set to.
aclError submit_to(Stream& stream, TaskPtr task, aclmdlRITaskType type = ACL_MODEL_RI_TASK_DEFAULT);

/// Error (set) when the host may not wait for or ask about `stream` because it is being captured.
aclError refuse_capturing(const Stream& stream, const char* function);
/// Error (set) when a capture forbids calls that are unsafe during capture on this thread.
aclError refuse_unsafe(const char* function);
/// Error (set) for an asynchronous copy from or to memory that is not pinned on a stream that is being
/// captured.
aclError refuse_staged_copy(const Stream& stream, const char* function);
/// Error (set) when a stream of the device is being captured.
aclError refuse_device_wait(const Device& device, const char* function);

}  // namespace host_runtime
