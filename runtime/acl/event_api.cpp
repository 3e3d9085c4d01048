// The C interface of events.
#include "runtime/acl/capture.h"
#include "runtime/acl/check.h"
#include "runtime/acl/counters.h"
#include "runtime/acl/event.h"

using namespace host_runtime;

namespace {

constexpr uint32_t kKnownFlags = ACL_EVENT_SYNC | ACL_EVENT_CAPTURE_STREAM_PROGRESS | ACL_EVENT_TIME_LINE |
                                 ACL_EVENT_DEVICE_USE_ONLY | ACL_EVENT_EXTERNAL | ACL_EVENT_IPC;

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

aclError create_event(aclrtEvent* event, uint32_t flags, const char* function) {
  return guarded(function, [&] {
    if (event == nullptr) return fail_null(function, "event");
    if ((flags & ~kKnownFlags) != 0) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  std::string(function) + ": unknown flags " + std::to_string(flags & ~kKnownFlags));
    }
    if (require_context(function) == nullptr) return last_error();
    if ((flags & ACL_EVENT_IPC) != 0) return create_ipc_event(event, flags);
    const auto kind = (flags & ACL_EVENT_EXTERNAL) != 0 ? Event::Kind::kExternal : Event::Kind::kCounting;
    *event = register_event(std::make_shared<Event>(flags, kind, std::make_shared<EventState>()));
    return ACL_SUCCESS;
  });
}

aclError submit_event(aclrtStream stream_handle, aclrtEvent handle, EventTask::Action action,
                      const char* function) {
  return guarded(function, [&] {
    const auto event = find_event(handle, function);
    if (!event) return last_error();
    const auto stream = find_stream(stream_handle, function);
    if (!stream) return last_error();
    return submit_event_task(*stream, event, action, function);
  });
}

aclError synchronize_event(aclrtEvent handle, int64_t timeout_ms, const char* function) {
  return guarded(function, [&] {
    const auto event = find_event(handle, function);
    if (!event) return last_error();
    if (const aclError error = refuse_captured_event(*event, function)) return error;
    count(Counter::kHostSynchronizations);
    const trace::Call call(function);
    if (event->kind == Event::Kind::kExternal) {
      event->wait_flag();
      check::synchronized(*event);
      return ACL_SUCCESS;
    }
    const uint64_t record = event->state->recorded.load();
    if (!event->wait(record, deadline_after_ms(timeout_ms))) {
      return fail(ACL_ERROR_RT_EVENT_SYNC_TIMEOUT,
                  std::string(function) + ": the event was not reached in time");
    }
    check::synchronized(*event);
    if (const auto failure = event->failure())
      return fail(failure->code, std::string(function) + ": " + failure->message);
    return ACL_SUCCESS;
  });
}

/// Complete when every record submitted so far was reached; an event that was never recorded is complete.
aclError query(aclrtEvent handle, const char* function, bool* complete) {
  const auto event = find_event(handle, function);
  if (!event) return last_error();
  if (const aclError error = refuse_captured_event(*event, function)) return error;
  *complete =
      event->kind == Event::Kind::kExternal ? event->flag() : event->reached(event->state->recorded.load());
  if (*complete) check::synchronized(*event);
  return ACL_SUCCESS;
}

/// The time of the last record, or error 107006 when there is none.
aclError timestamp(const Event& event, const char* function, int64_t* time_ns) {
  if ((event.flags & ACL_EVENT_TIME_LINE) == 0 && event.flags != 0) {
    return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID,
                std::string(function) +
                    ": the event keeps no time; create it with ACL_EVENT_TIME_LINE (torch.npu.Event("
                    "enable_timing=True))");
  }
  if (event.state->recorded.load() == 0 || !event.reached(event.state->recorded.load())) {
    return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID,
                std::string(function) + ": the event was not recorded, or not reached yet");
  }
  *time_ns = event.state->time_ns.load();
  return ACL_SUCCESS;
}

}  // namespace

aclError aclrtCreateEvent(aclrtEvent* event) { return create_event(event, 0, "aclrtCreateEvent"); }

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) {
  return create_event(event, flag, "aclrtCreateEventWithFlag");
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) {
  if ((flag & ACL_EVENT_EXTERNAL) != 0) {
    return fail(ACL_ERROR_INVALID_PARAM,
                "aclrtCreateEventExWithFlag: external events are made by aclrtCreateEventWithFlag");
  }
  return create_event(event, flag, "aclrtCreateEventExWithFlag");
}

aclError aclrtDestroyEvent(aclrtEvent event) {
  if (event == nullptr) return fail_null("aclrtDestroyEvent", "event");
  if (unregister_event(event)) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_INVALID_HANDLE, "aclrtDestroyEvent: this event does not exist (destroyed twice?)");
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
  return submit_event(stream, event, EventTask::Action::kRecord, "aclrtRecordEvent");
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
  return submit_event(stream, event, EventTask::Action::kWait, "aclrtStreamWaitEvent");
}

aclError aclrtStreamWaitEventWithTimeout(aclrtStream stream, aclrtEvent event, int32_t) {
  return submit_event(stream, event, EventTask::Action::kWait, "aclrtStreamWaitEventWithTimeout");
}

aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) {
  return submit_event(stream, event, EventTask::Action::kReset, "aclrtResetEvent");
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  return synchronize_event(event, -1, "aclrtSynchronizeEvent");
}

aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout) {
  return synchronize_event(event, timeout, "aclrtSynchronizeEventWithTimeout");
}

aclError aclrtQueryEvent(aclrtEvent event, aclrtEventStatus* status) {
  return guarded("aclrtQueryEvent", [&] {
    if (status == nullptr) return fail_null("aclrtQueryEvent", "status");
    bool complete = false;
    if (const aclError error = query(event, "aclrtQueryEvent", &complete)) return error;
    *status = complete ? ACL_EVENT_STATUS_COMPLETE : ACL_EVENT_STATUS_NOT_READY;
    return ACL_SUCCESS;
  });
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  return guarded("aclrtQueryEventStatus", [&] {
    if (status == nullptr) return fail_null("aclrtQueryEventStatus", "status");
    bool complete = false;
    if (const aclError error = query(event, "aclrtQueryEventStatus", &complete)) return error;
    *status = complete ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return ACL_SUCCESS;
  });
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus* status) {
  return guarded("aclrtQueryEventWaitStatus", [&] {
    if (status == nullptr) return fail_null("aclrtQueryEventWaitStatus", "status");
    bool complete = false;
    if (const aclError error = query(event, "aclrtQueryEventWaitStatus", &complete)) return error;
    *status = complete ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
    return ACL_SUCCESS;
  });
}

aclError aclrtEventElapsedTime(float* ms, aclrtEvent startEvent, aclrtEvent endEvent) {
  return guarded("aclrtEventElapsedTime", [&] {
    const char* const function = "aclrtEventElapsedTime";
    if (ms == nullptr) return fail_null(function, "ms");
    const auto start = find_event(startEvent, function);
    const auto end = find_event(endEvent, function);
    if (!start || !end) return last_error();
    int64_t from = 0;
    int64_t to = 0;
    if (const aclError error = timestamp(*start, function, &from)) return error;
    if (const aclError error = timestamp(*end, function, &to)) return error;
    *ms = static_cast<float>(static_cast<double>(to - from) / 1e6);
    return ACL_SUCCESS;
  });
}

aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t* microseconds) {
  return guarded("aclrtEventGetTimestamp", [&] {
    if (microseconds == nullptr) return fail_null("aclrtEventGetTimestamp", "timestamp");
    const auto event = find_event(handle, "aclrtEventGetTimestamp");
    if (!event) return last_error();
    int64_t time_ns = 0;
    if (const aclError error = timestamp(*event, "aclrtEventGetTimestamp", &time_ns)) return error;
    *microseconds = static_cast<uint64_t>(time_ns / 1000);
    return ACL_SUCCESS;
  });
}

aclError aclrtGetEventId(aclrtEvent handle, uint32_t* eventId) {
  if (eventId == nullptr) return fail_null("aclrtGetEventId", "eventId");
  const auto event = find_event(handle, "aclrtGetEventId");
  if (!event) return last_error();
  *eventId = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(event.get()) >> 4);
  return ACL_SUCCESS;
}

aclError aclrtGetEventAvailNum(uint32_t* eventCount) {
  if (eventCount == nullptr) return fail_null("aclrtGetEventAvailNum", "eventCount");
  *eventCount = 65535;
  return ACL_SUCCESS;
}
