#include "runtime/acl/stream.h"

#include <pthread.h>

#include "runtime/acl/capture.h"
#include "runtime/acl/check.h"
#include "runtime/acl/counters.h"
#include "runtime/acl/handles.h"

namespace host_runtime {
namespace {

HandleTable<Stream>& explicit_streams() {
  static auto* const table = new HandleTable<Stream>;
  return *table;
}

// Default streams are reached through their context, yet callers may hold their handle too.
HandleTable<Stream>& default_streams() {
  static auto* const table = new HandleTable<Stream>;
  return *table;
}

thread_local Stream* stream_of_thread = nullptr;
thread_local bool borrowed_thread = false;

}  // namespace

std::shared_ptr<Stream> Stream::create(Device& device, Kind kind, uint32_t priority, uint32_t flags) {
  const int32_t id = device.streams.take();
  if (id < 0) {
    fail(ACL_ERROR_RT_NO_STREAM_RESOURCE,
         "device " + std::to_string(device.id) + " has no stream left: all " +
             std::to_string(settings().streams) +
             " are held by streams and captured graphs; destroy some, or capture fewer sizes");
    return nullptr;
  }
  std::shared_ptr<Stream> stream(new Stream(device, kind, id, priority, flags));
  (kind == Kind::kDefault ? default_streams() : explicit_streams()).add(stream);
  return stream;
}

Stream::Stream(Device& device, Kind kind, int32_t id, uint32_t priority, uint32_t flags)
    : device(device), kind(kind), id(id), flags(flags), priority(priority) {}

Stream::~Stream() {
  close();
  check::forget_actor(this);
  device.streams.give_back(id);
}

std::string Stream::description() const {
  return (kind == Kind::kDefault ? "the default stream of device "
                                 : "stream " + std::to_string(id) + " of device ") +
         std::to_string(device.id);
}

aclError Stream::enqueue(TaskPtr task) {
  if (failed_.load() && stop_on_failure.load()) {
    const auto failure = this->failure();
    if (auto* control = dynamic_cast<ControlTask*>(task.get())) control->skip(*failure);
    return fail(failure->code, failure->message);
  }
  trace::Call call(*task);
  auto* const brief = check::on() ? nullptr : dynamic_cast<BriefTask*>(task.get());
  Entry entry{std::move(task), brief, check::submitted(), trace::Launch::next(label.load())};
  call.launched(entry.launch);
  if (runs_at_once(entry)) return ACL_SUCCESS;
  {
    std::lock_guard lock(queue_mutex_);
    if (closing_) {
      return fail(ACL_ERROR_RT_INVALID_HANDLE, entry.task->name() + ": " + description() + " was destroyed");
    }
    if (!worker_.joinable()) start_worker();
    queue_.push_back(std::move(entry));
    submitted_.fetch_add(1);
  }
  count(Counter::kTasks);
  if (brief != nullptr && work_arrived_.has_sleepers()) {
    if (can_go_on()) run_brief();
  } else if (!parked_.load()) {
    work_arrived_.notify();
  }
  return ACL_SUCCESS;
}

void Stream::start_worker() {
  worker_ = std::thread([this] { work(); });
  const std::string name = "npu" + std::to_string(device.id) + "-s" + std::to_string(id);
  pthread_setname_np(worker_.native_handle(), name.c_str());
}

void Stream::work() {
  run_for(this);
  for (;;) {
    work_arrived_.wait([this] { return !running_.load() && (idle() ? stop_.load() : !parked_.load()); });
    if (!take_turn()) continue;
    run_queued(submitted_.load());
    const bool ends = stop_.load() && idle();
    end_turn();
    if (ends) return;
    between_replays_.fetch([this] { return !idle() || stop_.load(); });
  }
}

void Stream::end_turn() {
  running_.store(false);
  if (can_go_on() || stop_.load()) work_arrived_.notify();
}

/// Runs a brief task that nothing is queued before, on the calling thread: sooner than another one takes it.
bool Stream::runs_at_once(const Entry& entry) {
  if (entry.brief == nullptr || !idle() || !entry.brief->brief() || !take_turn()) return false;
  bool first = false;
  {
    std::lock_guard lock(queue_mutex_);
    first = idle() && !closing_;
    if (first) submitted_.fetch_add(1);
  }
  if (first) {
    count(Counter::kTasks);
    Stream* const outer = running_stream();
    run_for(this);
    run_one(entry);
    run_for(outer);
    completed_.fetch_add(1);
    work_done_.notify();
  }
  end_turn();
  return first;
}

/// Runs queued tasks up to the one numbered `target`, or to one that parks, or, if so asked, to one that is
/// not brief. For who has the turn.
void Stream::run_queued(uint64_t target, bool only_brief) {
  while (completed_.load() < target) {
    if (batch_.empty()) {
      std::lock_guard lock(queue_mutex_);
      batch_.swap(queue_);
    }
    const bool brief = batch_.front().brief != nullptr && batch_.front().brief->brief();
    if (!brief && (park(batch_.front()) || only_brief)) return;
    Entry entry = std::move(batch_.front());
    batch_.pop_front();
    run_one(entry);
    entry.task.reset();
    completed_.fetch_add(1);
    work_done_.notify();
  }
}

/// Whether the task that is next waits, and somebody will call go_on(). For who has the turn: who is called
/// meanwhile finds it taken, so it is looked for once more when the turn ends.
bool Stream::park(Entry& entry) {
  if (entry.brief == nullptr || (failed_.load() && stop_on_failure.load())) return false;
  auto self = weak_from_this().lock();
  if (!self) return false;
  parked_.store(true);
  if (!entry.brief->park(std::move(self)) || entry.brief->brief()) {
    parked_.store(false);
    return false;
  }
  entry.launch.begin_wait();
  return true;
}

void Stream::go_on() {
  if (parked_.exchange(false)) run_brief();
}

void Stream::run_brief() {
  if (!take_turn()) return;
  Stream* const outer = running_stream();
  run_for(this);
  run_queued(submitted_.load(), true);
  run_for(outer);
  end_turn();
}

/// Runs queued tasks up to the one numbered `target` on the calling thread, unless another thread runs them.
/// None of the later ones: they may wait for what the calling thread does next.
void Stream::run_while_waiting(uint64_t target) {
  if (running_stream() != nullptr) return;
  while (completed_.load() < target && !parked_.load() && take_turn()) {
    run_for(this);
    borrowed_thread = true;
    run_queued(target);
    borrowed_thread = false;
    run_for(nullptr);
    end_turn();
  }
}

void Stream::run_one(const Entry& entry) {
  Task& task = *entry.task;
  if (failed_.load() && stop_on_failure.load()) {
    count(Counter::kSkippedTasks);
    if (auto* control = dynamic_cast<ControlTask*>(&task)) control->skip(*failure());
    return;
  }
  try {
    check::before(*this, task, entry.submitted.get());
    const trace::Running running(*this, task, entry.launch);
    task.run();
    check::after(*this, task);
  } catch (const TaskError& error) {
    record_failure(error.code, task.name() + " on " + description() + " failed: " + error.what());
  } catch (const std::exception& error) {
    record_failure(ACL_ERROR_RT_AICORE_EXCEPTION,
                   task.name() + " on " + description() + " failed: " + error.what());
  }
}

void Stream::record_failure(aclError code, const std::string& message) {
  count(Counter::kFailedTasks);
  std::lock_guard lock(failure_mutex_);
  if (failure_) return;
  failure_ =
      StreamFailure{code, message + (stop_on_failure.load() ? "; the tasks after it were not run" : "")};
  failed_.store(true);
}

std::optional<StreamFailure> Stream::failure() const {
  if (!failed_.load()) return std::nullopt;
  std::lock_guard lock(failure_mutex_);
  return failure_;
}

aclError Stream::synchronize(const Deadline& deadline, const char* function) {
  count(Counter::kHostSynchronizations);
  const trace::Call call(function);
  const uint64_t target = submitted_.load();
  if (!deadline) run_while_waiting(target);
  if (!work_done_.wait([&] { return completed_.load() >= target; }, deadline)) {
    return fail(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT,
                std::string(function) + ": " + description() + " still has " +
                    std::to_string(target - completed_.load()) + " tasks to run when the timeout passed");
  }
  check::synchronized(*this);
  if (const auto failure = this->failure())
    return fail(failure->code, std::string(function) + ": " + failure->message);
  return ACL_SUCCESS;
}

void Stream::close() {
  {
    std::lock_guard lock(queue_mutex_);
    closing_ = true;
  }
  stop_.store(true);
  work_arrived_.notify();
  if (!worker_.joinable()) return;
  // The last reference may go away on the worker itself, with the task that held it.
  if (worker_.get_id() == std::this_thread::get_id()) {
    worker_.detach();
  } else {
    worker_.join();
  }
}

void Stream::abort(aclError code, const std::string& why) {
  stop_on_failure.store(true);
  record_failure(code, description() + " was aborted: " + why);
}

std::shared_ptr<Stream> find_stream(aclrtStream handle, const char* function) {
  if (handle == nullptr) {
    Context* context = require_context(function);
    return context == nullptr ? nullptr : context->default_stream();
  }
  if (auto stream = explicit_streams().find(handle)) return stream;
  if (auto stream = default_streams().find(handle)) return stream;
  fail(ACL_ERROR_RT_INVALID_HANDLE,
       std::string(function) + ": this stream does not exist (destroyed, or not a stream)");
  return nullptr;
}

std::vector<std::shared_ptr<Stream>> streams_of(const Device& device) {
  std::vector<std::shared_ptr<Stream>> result;
  for (auto* table : {&explicit_streams(), &default_streams()}) {
    for (auto& stream : table->all()) {
      if (&stream->device == &device) result.push_back(std::move(stream));
    }
  }
  return result;
}

Stream* running_stream() { return stream_of_thread; }

void run_for(Stream* stream) { stream_of_thread = stream; }

bool on_borrowed_thread() { return borrowed_thread; }

void forget_stream(const Stream* stream) {
  explicit_streams().remove(stream);
  default_streams().remove(stream);
}

aclError submit(aclrtStream handle, TaskPtr task) {
  return guarded("submit", [&] {
    const auto stream = find_stream(handle, "launch of a task");
    if (!stream) return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
    return submit_to(*stream, std::move(task));
  });
}

}  // namespace host_runtime
