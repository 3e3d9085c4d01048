// A stream: tasks that run one at a time, in order of submission, on the stream's thread or on one that waits
// for it.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "runtime/acl/device.h"
#include "runtime/acl/fetch_ahead.h"
#include "runtime/acl/shadow.h"
#include "runtime/acl/side_by_side.h"
#include "runtime/acl/task.h"
#include "runtime/acl/trace.h"
#include "runtime/acl/wait.h"

namespace host_runtime {

class Capture;
struct GroupUpdate;

/// The first error of a stream; it stays until the stream is destroyed or its device is reset.
struct StreamFailure {
  aclError code;
  std::string message;
};

/// A task that other streams or the host wait for: it must come to an end even when its stream has failed.
class ControlTask : public Task {
 public:
  /// Called instead of run() on a failed stream.
  virtual void skip(const StreamFailure& failure) = 0;
};

/// A task that is done sooner than another thread is awake. Whoever finds that it can run, runs it, where the
/// stream's thread sleeps or is not yet back from what it waited for.
class BriefTask {
 public:
  virtual ~BriefTask() = default;
  /// Whether run() would return soon; of a task that waits, whether that is over.
  virtual bool brief() const = 0;
  /// Of a task that waits: calls Stream::go_on() of its stream once brief() may hold. False where that can't
  /// be told: then the stream's thread waits.
  virtual bool park(std::shared_ptr<Stream>) { return false; }
};

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  enum class Kind { kDefault, kExplicit };

  /// Null when the device's stream budget is spent (error 207008 is then set).
  static std::shared_ptr<Stream> create(Device& device, Kind kind, uint32_t priority, uint32_t flags);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  /// Queues a task. Returns the stream's own error once it has failed.
  aclError enqueue(TaskPtr task);

  /// Waits until everything queued so far has run. Counts as a host synchronisation. Without a deadline the
  /// caller runs tasks itself that the stream's thread has not begun: neither thread has to be woken then,
  /// which takes longer than a small graph.
  aclError synchronize(const Deadline& deadline, const char* function);
  /// What the stream's next task waits for may be there. Runs brief tasks on the calling thread, and leaves
  /// the rest to the stream's own.
  void go_on();
  bool idle() const { return completed_.load() >= submitted_.load(); }
  std::optional<StreamFailure> failure() const;

  /// Lets queued tasks finish and ends the worker thread. Later tasks are refused.
  void close();
  /// Drops queued tasks (aclrtStreamAbort, aclrtDestroyStreamForce): the stream fails with `code`.
  void abort(aclError code, const std::string& why);

  std::string description() const;
  /// Threads for the graphs that this stream replays.
  Helpers& helpers() { return helpers_; }
  /// Of the stream's thread.
  BetweenReplays& between_replays() { return between_replays_; }

  Device& device;
  const Kind kind;
  const int32_t id;
  const uint32_t flags;
  std::atomic<uint32_t> priority;
  std::atomic<bool> stop_on_failure{false};
  std::atomic<uint32_t> overflow_switch{0};
  std::atomic<uint32_t> custom_tag{0};
  std::atomic<uint32_t> cache_operator_info{0};
  std::atomic<uint32_t> label{0};  ///< of the tasks to come (trace.h)
  std::mutex limits_mutex;
  std::map<int, uint32_t> core_limits;

  // Set while tasks go to a graph under construction or to an update of a task group, not to the queue.
  // `diverted` is the quick look; the pointers are guarded by capture_mutex().
  std::atomic<bool> diverted{false};
  std::shared_ptr<Capture> capture;
  std::shared_ptr<GroupUpdate> update;

 private:
  Stream(Device& device, Kind kind, int32_t id, uint32_t priority, uint32_t flags);
  struct Entry {
    TaskPtr task;
    BriefTask* brief;                        ///< the task, if it may be one
    std::unique_ptr<VectorClock> submitted;  // of the checking mode
    trace::Launch launch;
  };

  void start_worker();
  void work();
  bool take_turn() { return !running_.exchange(true); }
  void end_turn();
  bool can_go_on() const { return !idle() && !parked_.load(); }
  bool runs_at_once(const Entry& entry);
  void run_queued(uint64_t target, bool only_brief = false);
  void run_brief();
  bool park(Entry& entry);
  void run_while_waiting(uint64_t target);
  void run_one(const Entry& entry);
  void record_failure(aclError code, const std::string& message);

  std::mutex queue_mutex_;
  std::deque<Entry> queue_;  // guarded by queue_mutex_
  std::deque<Entry> batch_;  ///< taken out of the queue; of the thread that has the turn
  bool closing_ = false;     // guarded by queue_mutex_
  std::thread worker_;
  std::atomic<uint64_t> submitted_{0};
  std::atomic<uint64_t> completed_{0};
  /// Whether a thread has the turn: it alone takes tasks out of the queue.
  std::atomic<bool> running_{false};
  /// Whether the next task waits for something that calls go_on(). No thread has to wait meanwhile.
  std::atomic<bool> parked_{false};
  std::atomic<bool> stop_{false};
  std::atomic<bool> failed_{false};
  mutable std::mutex failure_mutex_;
  std::optional<StreamFailure> failure_;  // guarded by failure_mutex_
  WaitPoint work_arrived_{Spin::kLoop};
  WaitPoint work_done_{Spin::kLoop};
  Helpers helpers_{*this};
  BetweenReplays between_replays_;
};

/// The stream of a handle (null handle: the current context's default stream); null with the error set
/// otherwise.
std::shared_ptr<Stream> find_stream(aclrtStream handle, const char* function);
/// Every live stream of a device, its contexts' default streams included.
std::vector<std::shared_ptr<Stream>> streams_of(const Device& device);

/// Makes a handle invalid; the stream itself goes when its last task does.
void forget_stream(const Stream* stream);

/// The stream whose task the calling thread is running; null outside tasks.
Stream* running_stream();
/// Makes the calling thread one that runs tasks of `stream`; null: of none.
void run_for(Stream* stream);

}  // namespace host_runtime
