#include "runtime/acl/capture.h"

#include <algorithm>

#include "runtime/acl/counters.h"

namespace host_runtime {
namespace {

// How many captures of each mode are in progress; read without the mutex by every blocking copy.
std::atomic<int> captures_of_mode[3];

/// Modes of the captures that each thread began; a capture may end on another thread.
struct ThreadModes {
  std::mutex mutex;
  std::map<std::thread::id, std::vector<aclmdlRICaptureMode>> by_thread;
};

ThreadModes& thread_modes() {
  static auto* const all = new ThreadModes;
  return *all;
}

void enter_mode(aclmdlRICaptureMode mode) {
  captures_of_mode[mode].fetch_add(1);
  std::lock_guard lock(thread_modes().mutex);
  thread_modes().by_thread[std::this_thread::get_id()].push_back(mode);
}

void leave_mode(aclmdlRICaptureMode mode, std::thread::id thread) {
  captures_of_mode[mode].fetch_sub(1);
  std::lock_guard lock(thread_modes().mutex);
  auto& modes = thread_modes().by_thread[thread];
  modes.erase(std::find(modes.begin(), modes.end(), mode));
  if (modes.empty()) thread_modes().by_thread.erase(thread);
}

/// RELAXED for a thread that captures nothing.
aclmdlRICaptureMode strictest_mode_of_this_thread() {
  std::lock_guard lock(thread_modes().mutex);
  const auto found = thread_modes().by_thread.find(std::this_thread::get_id());
  if (found == thread_modes().by_thread.end()) return ACL_MODEL_RI_CAPTURE_MODE_RELAXED;
  return *std::min_element(found->second.begin(), found->second.end());
}

thread_local aclmdlRICaptureMode exchanged_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

/// Only operators can be replaced in a captured graph.
bool is_operator(const Task& task) { return task.name().compare(0, 5, "aclnn") == 0; }

aclError fail_invalidated(const Capture& capture, const std::string& what) {
  return fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
              what + ": the capture was invalidated by an earlier error: " + capture.invalid);
}

aclError invalidate(Capture& capture, aclError code, const std::string& message) {
  if (capture.invalid.empty()) capture.invalid = message;
  return fail(code, message);
}

aclError record_task(const std::shared_ptr<Capture>& capture, Stream& stream, TaskPtr task,
                     aclmdlRITaskType type) {
  const std::string name = task->name();
  if (!capture->invalid.empty()) return fail_invalidated(*capture, name);
  Capture::Member* member = capture->member_of(stream);
  for (const auto& other : capture->members) {
    if (other.open_group && &other != member) {
      return invalidate(*capture, ACL_ERROR_STREAM_TASK_GROUP_INTR,
                        name + ": while " + other.stream->description() +
                            " records a task group, no other stream of the capture may be given tasks");
    }
  }
  const bool is_kernel = is_operator(*task);
  if (member->open_group && !is_kernel) {
    return invalidate(*capture, ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT,
                      name + " cannot be in a task group: only operators (aclnn*) can");
  }
  if (type == ACL_MODEL_RI_TASK_DEFAULT && is_kernel) type = ACL_MODEL_RI_TASK_KERNEL;
  Node* node = capture->record(*member, std::move(task), type);
  if (member->open_group) {
    node->group = member->open_group;
    member->open_group->nodes.push_back(node->index);
  }
  if (stream.cache_operator_info.load() != 0) node->operator_info = node->task->arguments_json();
  return ACL_SUCCESS;
}

aclError collect_update(GroupUpdate& update, TaskPtr task) {
  const std::string name = task->name();
  if (!is_operator(*task)) {
    update.error = fail(ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT,
                        name + " cannot replace a task of a task group: only operators (aclnn*) can");
  } else if (update.tasks.size() == update.group->nodes.size()) {
    update.error =
        fail(ACL_ERROR_RT_INTERNAL_ERROR, name + ": the task group being updated has only " +
                                              std::to_string(update.group->nodes.size()) + " tasks");
  } else {
    update.tasks.push_back(std::move(task));
  }
  return update.error;
}

}  // namespace

std::mutex& capture_mutex() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

uint64_t& Capture::at(std::vector<uint64_t>& clock, size_t index) {
  if (clock.size() <= index) clock.resize(index + 1, 0);
  return clock[index];
}

Capture::Member* Capture::member_of(const Stream& stream) {
  for (Member& member : members) {
    if (member.stream.get() == &stream) return &member;
  }
  return nullptr;
}

Capture::Member* Capture::join(const std::shared_ptr<Stream>& stream) {
  if (!graph->add_stream(stream->id)) {
    if (invalid.empty()) invalid = "no stream was left";
    return nullptr;
  }
  members.push_back(Member{stream, {}, nullptr});
  return &members.back();
}

Node* Capture::record(Member& member, TaskPtr task, aclmdlRITaskType type) {
  size_t index = 0;
  while (&members[index] != &member) ++index;
  ++at(member.clock, index);
  count(Counter::kCapturedTasks);
  Node& node = graph->add_node(index, std::move(task), type);
  node.label = label;
  return &node;
}

bool Capture::unjoined(std::string* which) const {
  const auto& seen = members.front().clock;
  for (size_t i = 1; i < members.size(); ++i) {
    const uint64_t own = members[i].clock.size() > i ? members[i].clock[i] : 0;
    const uint64_t known = seen.size() > i ? seen[i] : 0;
    if (known < own) {
      *which = members[i].stream->description() + " has " + std::to_string(own - known) +
               " tasks (the last is " + graph->nodes[graph->streams[i]->nodes.back()].task->name() +
               ") after the last event of it that " + members.front().stream->description() + " waits for";
      return true;
    }
  }
  return false;
}

aclError submit_to(Stream& stream, TaskPtr task, aclmdlRITaskType type) {
  if (stream.diverted.load(std::memory_order_acquire)) {
    std::unique_lock lock(capture_mutex());
    if (stream.capture) return record_task(stream.capture, stream, std::move(task), type);
    if (stream.update) return collect_update(*stream.update, std::move(task));
  }
  return stream.enqueue(std::move(task));
}

aclError refuse_capturing(const Stream& stream, const char* function) {
  if (!stream.diverted.load(std::memory_order_acquire)) return ACL_SUCCESS;
  std::lock_guard lock(capture_mutex());
  if (!stream.capture) return ACL_SUCCESS;
  return fail(
      ACL_ERROR_RT_STREAM_CAPTURED,
      std::string(function) + ": " + stream.description() +
          " is being captured, so nothing runs on it that could be waited for or asked about; move this call "
          "(.item(), .cpu(), synchronize(), print of a tensor ...) before the capture or after its end");
}

aclError refuse_unsafe(const char* function) {
  const bool global = captures_of_mode[ACL_MODEL_RI_CAPTURE_MODE_GLOBAL].load() > 0;
  const bool local = captures_of_mode[ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL].load() > 0;
  if ((!global && !local) || exchanged_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return ACL_SUCCESS;
  const auto strictest = strictest_mode_of_this_thread();
  bool refused = false;
  if (exchanged_mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL) {
    refused = global || strictest == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL;
  } else {
    refused = strictest != ACL_MODEL_RI_CAPTURE_MODE_RELAXED;
  }
  if (!refused) return ACL_SUCCESS;
  return fail(
      ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
      std::string(function) + ": " + (strictest == ACL_MODEL_RI_CAPTURE_MODE_RELAXED ? "another" : "this") +
          " thread captures a graph in a mode that forbids blocking copies and fills; use a stream and an "
          "asynchronous copy, or the capture mode relaxed");
}

aclError refuse_staged_copy(const Stream& stream, const char* function) {
  if (stream.diverted.load(std::memory_order_acquire)) {
    std::lock_guard lock(capture_mutex());
    if (stream.capture) {
      return fail(ACL_ERROR_RT_PARAM_INVALID, std::string(function) + ": " + stream.description() +
                                                  " is being captured, and a copy from or to host memory can "
                                                  "only be captured when that memory is "
                                                  "pinned (tensor.pin_memory(), aclrtMallocHost)");
    }
  }
  if (refuse_unsafe(function) == ACL_SUCCESS) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC,
              std::string(function) +
                  ": a copy from or to host memory that is not pinned blocks, which the capture in "
                  "progress forbids; pin the memory, or use the capture mode relaxed");
}

aclError refuse_device_wait(const Device& device, const char* function) {
  for (const auto& stream : streams_of(device)) {
    if (const aclError error = refuse_capturing(*stream, function)) return error;
  }
  return ACL_SUCCESS;
}

aclError refuse_captured_event(const Event& event, const char* function) {
  std::lock_guard lock(capture_mutex());
  const auto capture = event.capture.lock();
  if (!capture || !capture->active) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_EVENT_CAPTURED,
              std::string(function) +
                  ": the event was recorded by a capture in progress and will not be reached before "
                  "its graph is replayed");
}

namespace {

/// Joins `stream` to the capture that recorded the event, if it is not in it already.
aclError capture_wait(Stream& stream, const std::shared_ptr<Event>& event,
                      const std::shared_ptr<Capture>& capture, const char* function) {
  const std::string what = std::string(function) + " on " + stream.description() + ": ";
  if (stream.kind == Stream::Kind::kDefault) {
    return invalidate(*capture, ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT,
                      what + "the default stream cannot join a capture");
  }
  if (stream.capture && stream.capture != capture) {
    invalidate(*stream.capture, ACL_ERROR_STREAM_CAPTURE_CONFLICT,
               what + "the event belongs to another capture");
    return invalidate(*capture, ACL_ERROR_STREAM_CAPTURE_CONFLICT,
                      what + "the event belongs to another capture");
  }
  if (!capture->invalid.empty()) return fail_invalidated(*capture, function);
  Capture::Member* member = capture->member_of(stream);
  if (member == nullptr) {
    member = capture->join(find_stream(&stream, function));
    if (member == nullptr) return last_error();
    stream.capture = capture;
    stream.diverted.store(true, std::memory_order_release);
  }
  for (size_t i = 0; i < event->capture_clock.size(); ++i) {
    if (member->clock.size() <= i) member->clock.resize(i + 1, 0);
    member->clock[i] = std::max(member->clock[i], event->capture_clock[i]);
  }
  auto task = std::make_shared<CapturedEventTask>(event, EventTask::Action::kWait);
  Node* node = capture->record(*member, std::move(task), ACL_MODEL_RI_TASK_EVENT_WAIT);
  node->awaits = event->capture_node;
  return ACL_SUCCESS;
}

aclError capture_record(Stream& stream, const std::shared_ptr<Event>& event, const char* function) {
  const auto capture = stream.capture;
  if (!capture->invalid.empty()) return fail_invalidated(*capture, function);
  const auto other = event->capture.lock();
  if (other && other->active && other != capture) {
    invalidate(*other, ACL_ERROR_STREAM_CAPTURE_CONFLICT, "an event was recorded by two captures");
    return invalidate(*capture, ACL_ERROR_STREAM_CAPTURE_CONFLICT,
                      std::string(function) + ": the event belongs to another capture");
  }
  Capture::Member* member = capture->member_of(stream);
  auto task = std::make_shared<CapturedEventTask>(event, EventTask::Action::kRecord);
  const Node* node = capture->record(*member, std::move(task), ACL_MODEL_RI_TASK_EVENT_RECORD);
  event->capture = capture;
  event->capture_clock = member->clock;
  event->capture_node = static_cast<int64_t>(node->index);
  return ACL_SUCCESS;
}

aclmdlRITaskType node_type(EventTask::Action action) {
  switch (action) {
    case EventTask::Action::kRecord:
      return ACL_MODEL_RI_TASK_EVENT_RECORD;
    case EventTask::Action::kWait:
      return ACL_MODEL_RI_TASK_EVENT_WAIT;
    case EventTask::Action::kReset:
      break;
  }
  return ACL_MODEL_RI_TASK_EVENT_RESET;
}

}  // namespace

aclError submit_event_task(Stream& stream, const std::shared_ptr<Event>& event, EventTask::Action action,
                           const char* function) {
  std::unique_lock lock(capture_mutex());
  if (event->kind == Event::Kind::kExternal) {
    auto task = std::make_shared<EventTask>(event, action, 0);
    if (stream.capture) return record_task(stream.capture, stream, std::move(task), node_type(action));
    lock.unlock();
    return submit_to(stream, std::move(task));
  }
  const auto recorded_by = event->capture.lock();
  const bool captured = recorded_by && recorded_by->active;
  switch (action) {
    case EventTask::Action::kWait:
      if (captured) return capture_wait(stream, event, recorded_by, function);
      if (stream.capture) {
        return invalidate(
            *stream.capture, ACL_ERROR_RT_CAPTURE_DEPENDENCY,
            std::string(function) + " on " + stream.description() +
                ": the event was not recorded by this capture; record it on a stream of the capture, or "
                "wait for it before the capture begins");
      }
      break;
    case EventTask::Action::kRecord:
      if (stream.capture) return capture_record(stream, event, function);
      if (captured && stream.kind == Stream::Kind::kDefault) {
        return invalidate(*recorded_by, ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT,
                          std::string(function) +
                              ": an event of a capture in progress cannot be recorded on the default stream");
      }
      event->capture.reset();
      break;
    case EventTask::Action::kReset:
      if (stream.capture) {
        return fail(ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT,
                    std::string(function) + ": only external events are reset in a capture");
      }
      break;
  }
  lock.unlock();
  const uint64_t record =
      action == EventTask::Action::kRecord ? event->announce_record() : event->state->recorded.load();
  return stream.enqueue(std::make_shared<EventTask>(event, action, record));
}

namespace {

/// Ends what binds the streams to the capture; the graph, if it is good, lives on.
void release_streams(Capture& capture) {
  capture.active = false;
  for (Capture::Member& member : capture.members) {
    member.stream->capture.reset();
    member.stream->diverted.store(member.stream->update != nullptr, std::memory_order_release);
  }
  leave_mode(capture.mode, capture.thread);
}

aclError end_capture(const std::shared_ptr<Capture>& capture, const char* function) {
  if (capture->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id()) {
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD,
                std::string(function) +
                    ": the capture began on another thread; only captures in the mode relaxed may "
                    "end on another");
  }
  if (!capture->invalid.empty()) return fail_invalidated(*capture, function);
  for (const Capture::Member& member : capture->members) {
    if (member.open_group) {
      return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, std::string(function) + ": a task group on " +
                                                          member.stream->description() + " was not ended");
    }
  }
  std::string which;
  if (capture->unjoined(&which)) {
    return fail(
        ACL_ERROR_RT_STREAM_UNJOINED,
        std::string(function) + ": a stream of the capture was not joined: " + which +
            "; record an event after its last task and let the stream that began the capture wait for it");
  }
  return ACL_SUCCESS;
}

}  // namespace
}  // namespace host_runtime

using namespace host_runtime;

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  return guarded("aclmdlRICaptureBegin", [&] {
    const char* const function = "aclmdlRICaptureBegin";
    if (mode < ACL_MODEL_RI_CAPTURE_MODE_GLOBAL || mode > ACL_MODEL_RI_CAPTURE_MODE_RELAXED) {
      return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": unknown mode " + std::to_string(mode));
    }
    const auto stream = find_stream(handle, function);
    if (!stream) return last_error();
    if (stream->kind == Stream::Kind::kDefault) {
      return fail(
          ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT,
          std::string(function) + ": the default stream cannot be captured; capture on a stream of its own");
    }
    std::lock_guard lock(capture_mutex());
    if (stream->capture) {
      return fail(ACL_ERROR_RT_STREAM_CAPTURED,
                  std::string(function) + ": " + stream->description() + " is being captured already");
    }
    if (stream->update) {
      return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                  std::string(function) + ": a task group is being updated on " + stream->description());
    }
    auto capture = std::make_shared<Capture>(std::make_shared<Graph>(stream->device), mode);
    if (capture->join(stream) == nullptr) return last_error();
    register_graph(capture->graph);
    stream->capture = std::move(capture);
    stream->diverted.store(true, std::memory_order_release);
    enter_mode(mode);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* modelRI) {
  return guarded("aclmdlRICaptureGetInfo", [&] {
    if (status == nullptr && modelRI == nullptr)
      return fail_null("aclmdlRICaptureGetInfo", "status and modelRI");
    const auto stream = find_stream(handle, "aclmdlRICaptureGetInfo");
    if (!stream) return last_error();
    std::shared_ptr<Capture> capture;
    aclmdlRICaptureStatus found = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (stream->diverted.load(std::memory_order_acquire)) {
      std::lock_guard lock(capture_mutex());
      capture = stream->capture;
      if (capture) {
        found = capture->invalid.empty() ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE
                                         : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
      }
    }
    if (status != nullptr) *status = found;
    if (modelRI != nullptr) *modelRI = capture ? capture->graph.get() : nullptr;
    return ACL_SUCCESS;
  });
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  if (mode == nullptr) return fail_null("aclmdlRICaptureThreadExchangeMode", "mode");
  if (*mode < ACL_MODEL_RI_CAPTURE_MODE_GLOBAL || *mode > ACL_MODEL_RI_CAPTURE_MODE_RELAXED) {
    return fail(ACL_ERROR_INVALID_PARAM,
                "aclmdlRICaptureThreadExchangeMode: unknown mode " + std::to_string(*mode));
  }
  std::swap(*mode, exchanged_mode);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* modelRI) {
  return guarded("aclmdlRICaptureEnd", [&] {
    const char* const function = "aclmdlRICaptureEnd";
    if (modelRI == nullptr) return fail_null(function, "modelRI");
    *modelRI = nullptr;
    const auto stream = find_stream(handle, function);
    if (!stream) return last_error();
    std::shared_ptr<Capture> capture;
    std::lock_guard lock(capture_mutex());
    capture = stream->capture;
    if (!capture) {
      return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED,
                  std::string(function) + ": " + stream->description() + " is not being captured");
    }
    if (capture->members.front().stream != stream) {
      return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, std::string(function) + ": the capture began on " +
                                                             capture->members.front().stream->description() +
                                                             " and must end there, not on " +
                                                             stream->description());
    }
    const aclError error = end_capture(capture, function);
    release_streams(*capture);
    if (error != ACL_SUCCESS) {
      unregister_graph(capture->graph.get());
      return error;
    }
    capture->graph->finish();
    *modelRI = capture->graph.get();
    count(Counter::kCaptures);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
  return guarded("aclmdlRICaptureTaskGrpBegin", [&] {
    const char* const function = "aclmdlRICaptureTaskGrpBegin";
    const auto stream = find_stream(handle, function);
    if (!stream) return last_error();
    std::lock_guard lock(capture_mutex());
    if (!stream->capture) {
      return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED,
                  std::string(function) + ": " + stream->description() + " is not being captured");
    }
    Capture::Member* member = stream->capture->member_of(*stream);
    if (member->open_group || stream->update) {
      return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, std::string(function) +
                                                          ": a task group is recorded or updated on " +
                                                          stream->description() + " already");
    }
    member->open_group = std::make_shared<TaskGroup>();
    member->open_group->graph = stream->capture->graph;
    return ACL_SUCCESS;
  });
}
