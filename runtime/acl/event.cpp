#include "runtime/acl/event.h"

#include <algorithm>

#include "runtime/acl/check.h"
#include "runtime/acl/handles.h"

namespace host_runtime {
namespace {

HandleTable<Event>& events() {
  static auto* const table = new HandleTable<Event>;
  return *table;
}

std::string address(const void* pointer) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", pointer);
  return text;
}

}  // namespace

std::shared_ptr<Event> find_event(aclrtEvent handle, const char* function) {
  if (handle == nullptr) {
    fail_null(function, "event");
    return nullptr;
  }
  auto event = events().find(handle);
  if (!event) {
    fail(ACL_ERROR_RT_INVALID_HANDLE,
         std::string(function) + ": this event does not exist (destroyed, or not an event)");
  }
  return event;
}

aclrtEvent register_event(std::shared_ptr<Event> event) { return events().add(std::move(event)); }

std::shared_ptr<Event> unregister_event(aclrtEvent handle) { return events().remove(handle); }

Event::~Event() { check::event_ended(*this); }

void Event::reach(uint64_t record) {
  state->time_ns.store(
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count());
  uint64_t completed = state->completed.load();
  while (completed < record && !state->completed.compare_exchange_weak(completed, record)) {
  }
  changed_.notify();
  let_go();
}

void Event::park(std::shared_ptr<Stream> stream) {
  std::lock_guard lock(parked_mutex_);
  parked_.push_back(std::move(stream));
  has_parked_.store(true);
}

void Event::let_go() {
  if (!has_parked_.load()) return;
  std::vector<std::shared_ptr<Stream>> streams;
  {
    std::lock_guard lock(parked_mutex_);
    streams.swap(parked_);
    has_parked_.store(false);
  }
  for (const auto& stream : streams) stream->go_on();
}

void Event::fail_record(uint64_t record, const StreamFailure& failure) {
  {
    std::lock_guard lock(failure_mutex_);
    failure_ = failure;
  }
  state->failure_code.store(failure.code);
  reach(record);
}

std::optional<StreamFailure> Event::failure() const {
  const aclError code = state->failure_code.load();
  if (code == ACL_SUCCESS) return std::nullopt;
  std::lock_guard lock(failure_mutex_);
  if (failure_) return failure_;
  return StreamFailure{code, "the stream of another process that should have recorded the event failed"};
}

bool Event::wait(uint64_t record, const Deadline& deadline) {
  if (!between_processes) return changed_.wait([&] { return reached(record); }, deadline);
  // Another process cannot wake this one's threads: look again after growing pauses.
  auto pause = std::chrono::microseconds(20);
  while (!reached(record)) {
    if (deadline && Clock::now() >= *deadline) return false;
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(1000));
  }
  return true;
}

void Event::set_flag() {
  flag_.store(1);
  changed_.notify();
}

void Event::clear_flag() { flag_.store(0); }

void Event::wait_flag() {
  changed_.wait([&] { return flag(); });
}

void EventTask::run() {
  if (event->kind == Event::Kind::kExternal) {
    switch (action) {
      case Action::kRecord:
        return event->set_flag();
      case Action::kWait:
        return event->wait_flag();
      case Action::kReset:
        return event->clear_flag();
    }
  }
  if (action == Action::kRecord) return event->reach(record);
  if (action == Action::kWait) {
    event->wait(record, std::nullopt);
    if (const auto failure = event->failure()) {
      throw TaskError(failure->code, "the event it waited for was not reached, because " + failure->message);
    }
  }
}

void EventTask::skip(const StreamFailure& failure) {
  if (action != Action::kRecord) return;
  if (event->kind == Event::Kind::kExternal) return event->set_flag();
  event->fail_record(record, failure);
}

bool EventTask::ready() const {
  if (action != Action::kWait) return true;
  return event->kind == Event::Kind::kExternal ? event->flag() : event->reached(record);
}

bool EventTask::park(std::shared_ptr<Stream> stream) {
  if (action != Action::kWait || !reaches_once()) return false;
  event->park(std::move(stream));
  return true;
}

void CapturedEventTask::run() {
  // Only events that keep time have something to do: they can be read after a replay.
  if (action == EventTask::Action::kRecord && (event->flags & ACL_EVENT_TIME_LINE) != 0) {
    event->reach(event->announce_record());
  }
}

std::string EventTask::name() const {
  switch (action) {
    case Action::kRecord:
      return "aclrtRecordEvent";
    case Action::kWait:
      return "aclrtStreamWaitEvent";
    case Action::kReset:
      break;
  }
  return "aclrtResetEvent";
}

std::string EventTask::arguments_json() const {
  return "{\"event\": \"" + address(event.get()) + "\", \"flags\": " + std::to_string(event->flags) + "}";
}

}  // namespace host_runtime
