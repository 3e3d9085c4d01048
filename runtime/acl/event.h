// Events: points in a stream that other streams and the host can wait for.
#pragma once

#include <memory>
#include <optional>

#include "runtime/acl/stream.h"

namespace host_runtime {

/// What an event's tasks share, in memory that other processes can map when the event is made for IPC.
struct EventState {
  std::atomic<uint64_t> recorded{0};     ///< records submitted so far
  std::atomic<uint64_t> completed{0};    ///< the latest record that has been reached
  std::atomic<int64_t> time_ns{0};       ///< when it was reached, on the steady clock
  std::atomic<int32_t> failure_code{0};  ///< of the stream that should have reached it
};

class Event {
 public:
  /// kCounting: a wait is for the latest record submitted before it. kExternal: a flag that waits block on
  /// until a record sets it and that a reset clears (ACL_EVENT_EXTERNAL).
  enum class Kind { kCounting, kExternal };

  Event(uint32_t flags, Kind kind, std::shared_ptr<EventState> state, bool between_processes = false)
      : flags(flags), kind(kind), between_processes(between_processes), state(std::move(state)) {}
  ~Event();

  /// The number that the next record completes.
  uint64_t announce_record() { return state->recorded.fetch_add(1) + 1; }
  void reach(uint64_t record);
  void fail_record(uint64_t record, const StreamFailure& failure);
  bool reached(uint64_t record) const { return state->completed.load() >= record; }
  bool wait(uint64_t record, const Deadline& deadline);
  std::optional<StreamFailure> failure() const;
  /// Lets the stream go on when the next record is reached.
  void park(std::shared_ptr<Stream> stream);

  void set_flag();
  void clear_flag();
  bool flag() const { return flag_.load() != 0; }
  void wait_flag();

  const uint32_t flags;
  const Kind kind;
  const bool between_processes;
  const std::shared_ptr<EventState> state;

  // While the event was last recorded by a capture in progress: which, and where. Guarded by capture_mutex().
  std::weak_ptr<Capture> capture;
  std::vector<uint64_t> capture_clock;
  int64_t capture_node = -1;

 private:
  void let_go();

  std::atomic<uint32_t> flag_{0};
  mutable std::mutex failure_mutex_;
  std::optional<StreamFailure> failure_;  // guarded by failure_mutex_
  WaitPoint changed_{Spin::kThread};
  std::mutex parked_mutex_;
  std::vector<std::shared_ptr<Stream>> parked_;  // guarded by parked_mutex_
  std::atomic<bool> has_parked_{false};
};

/// Null, with the error set, when the handle names no event.
std::shared_ptr<Event> find_event(aclrtEvent handle, const char* function);
/// The new handle.
aclrtEvent register_event(std::shared_ptr<Event> event);
/// Null when the handle names no event.
std::shared_ptr<Event> unregister_event(aclrtEvent handle);
/// An event whose state other processes can open (ipc.cpp).
aclError create_ipc_event(aclrtEvent* event, uint32_t flags);

/// A task that may block until another stream, process or the host does something.
class WaitingTask : public ControlTask {
 public:
  /// Whether run() would return at once.
  virtual bool ready() const = 0;
  /// True for one that lets others go on (a record, a write), false for one that waits.
  virtual bool gives_order() const = 0;
};

/// A task that records, waits for or resets an event, alone or as a node of a graph.
class EventTask : public WaitingTask, public BriefTask {
 public:
  enum class Action { kRecord, kWait, kReset };
  EventTask(std::shared_ptr<Event> event, Action action, uint64_t record)
      : event(std::move(event)), action(action), record(record) {}

  void run() override;
  void skip(const StreamFailure& failure) override;
  std::string name() const override;
  std::string arguments_json() const override;
  bool ready() const override;
  bool gives_order() const override { return action != Action::kWait; }
  bool brief() const override { return action != Action::kWait || (reaches_once() && ready()); }
  bool park(std::shared_ptr<Stream> stream) override;

  const std::shared_ptr<Event> event;
  const Action action;
  const uint64_t record;

 private:
  /// Whether the record stays reached, and this process is told.
  bool reaches_once() const { return event->kind == Event::Kind::kCounting && !event->between_processes; }
};

/// An event between the streams of one graph. The order of the nodes already is what it asks for.
class CapturedEventTask final : public Task {
 public:
  CapturedEventTask(std::shared_ptr<Event> event, EventTask::Action action)
      : event(std::move(event)), action(action) {}

  void run() override;
  std::string name() const override {
    return action == EventTask::Action::kRecord ? "aclrtRecordEvent" : "aclrtStreamWaitEvent";
  }

  const std::shared_ptr<Event> event;
  const EventTask::Action action;
};

/// Queues the task on the stream, or records it in the stream's capture.
aclError submit_event_task(Stream& stream, const std::shared_ptr<Event>& event, EventTask::Action action,
                           const char* function);
/// Error (set) when a capture in progress recorded the event: the host may neither wait for it nor ask about
/// it.
aclError refuse_captured_event(const Event& event, const char* function);

}  // namespace host_runtime
