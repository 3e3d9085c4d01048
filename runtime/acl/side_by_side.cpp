#include "runtime/acl/side_by_side.h"

#include <pthread.h>

#include <utility>

#include "runtime/acl/event.h"
#include "runtime/acl/graph.h"

namespace host_runtime {
namespace {

/// How long a thread sleeps at most before it looks again at what comes from outside of a graph.
constexpr auto kLongestPause = std::chrono::microseconds(200);

thread_local const SideBySide* run_of_thread = nullptr;

}  // namespace

bool runs_beside_others() { return run_of_thread != nullptr && run_of_thread->threads() > 1; }

Helpers::~Helpers() {
  stop_.store(true);
  for (const auto& helper : helpers_) {
    helper->changed.notify();
    helper->thread.join();
  }
}

void Helpers::call(size_t count, std::function<void()> job) {
  job_ = std::move(job);
  launch_ = trace::running_launch();
  while (helpers_.size() < count) {
    helpers_.push_back(std::make_unique<Helper>());
    Helper& helper = *helpers_.back();
    helper.thread = std::thread([this, &helper] { work(helper); });
    const std::string name =
        "npu" + std::to_string(stream_.device.id) + "-s" + std::to_string(stream_.id) + "+";
    pthread_setname_np(helper.thread.native_handle(), name.c_str());
  }
  for (size_t i = 0; i < count; ++i) {
    helpers_[i]->state.store(State::kCalled);
    helpers_[i]->changed.notify();
  }
}

void Helpers::wait() {
  for (const auto& helper : helpers_) {
    State state = State::kCalled;
    if (helper->state.compare_exchange_strong(state, State::kIdle)) continue;
    helper->changed.wait([&] { return helper->state.load() == State::kIdle; });
  }
}

void Helpers::work(Helper& helper) {
  run_for(&stream_);
  for (;;) {
    helper.changed.wait([&] { return helper.state.load() == State::kCalled || stop_.load(); });
    if (stop_.load()) return;
    State state = State::kCalled;
    if (!helper.state.compare_exchange_strong(state, State::kRunning)) continue;
    trace::run_for(launch_);
    job_();
    helper.state.store(State::kIdle);
    helper.changed.notify();
  }
}

bool SideBySide::pays(const Graph& graph) { return graph.streams.size() > 1 && usable_cores() > 1; }

SideBySide::SideBySide(Graph& graph)
    : graph_(graph),
      awaited_(graph.nodes.size(), false),
      done_(std::make_unique<std::atomic<bool>[]>(graph.nodes.size())),
      next_(graph.streams.size()),
      taken_(graph.streams.size()) {
  for (const Node& node : graph.nodes) {
    polls_ = polls_ || node.blocks;
    if (node.awaits < 0) continue;
    const auto source = static_cast<size_t>(node.awaits);
    if (graph.nodes[source].stream != node.stream) awaited_[source] = true;
  }
}

void SideBySide::run(Helpers& helpers) {
  for (size_t i = 0; i < graph_.nodes.size(); ++i) done_[i].store(false, std::memory_order_relaxed);
  std::fill(next_.begin(), next_.end(), size_t{0});
  std::fill(taken_.begin(), taken_.end(), false);
  left_.store(graph_.nodes.size());
  failed_.store(false);
  failure_ = nullptr;
  helpers_ = &helpers;
  work();
  helpers.wait();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

/// What each thread of a run does until the run is over.
void SideBySide::work() {
  auto pause = std::chrono::microseconds(1);
  const auto something = [this] {
    std::lock_guard lock(mutex_);
    return over() || pick().has_value();
  };
  for (;;) {
    std::optional<size_t> stream;
    {
      std::lock_guard lock(mutex_);
      if (over()) return;
      stream = pick();
      if (stream) taken_[*stream] = true;
    }
    if (!stream) {
      changed_.wait(something, polls_ ? Deadline(Clock::now() + pause) : std::nullopt);
      if (graph_.abort.load() && !over()) fail();
      pause = std::min(pause * 2, kLongestPause);
      continue;
    }
    pause = std::chrono::microseconds(1);
    if (something()) share();
    run_of_thread = this;
    threads_.fetch_add(1);
    go_on(*stream);
    threads_.fetch_sub(1);
    run_of_thread = nullptr;
    {
      std::lock_guard lock(mutex_);
      taken_[*stream] = false;
    }
    changed_.notify();
  }
}

/// A stream that nobody runs and that can go on. With the mutex held.
std::optional<size_t> SideBySide::pick() const {
  for (size_t stream = 0; stream < taken_.size(); ++stream) {
    if (!taken_[stream] && can_go_on(stream)) return stream;
  }
  return std::nullopt;
}

bool SideBySide::can_go_on(size_t stream) const {
  const auto& own = graph_.streams[stream]->nodes;
  return next_[stream] < own.size() && may_run(graph_.nodes[own[next_[stream]]]);
}

bool SideBySide::may_run(const Node& node) const {
  if (node.awaits >= 0 && !done_[static_cast<size_t>(node.awaits)].load(std::memory_order_acquire))
    return false;
  return !node.blocks || graph_.ready(node.index);
}

/// Runs a stream until it has to wait for another one, or for something outside.
void SideBySide::go_on(size_t stream) {
  const auto& own = graph_.streams[stream]->nodes;
  while (!failed_.load() && can_go_on(stream)) {
    const size_t index = own[next_[stream]];
    try {
      graph_.run_range(index, index + 1);
    } catch (...) {
      return fail();
    }
    done_[index].store(true, std::memory_order_release);
    left_.fetch_sub(1);
    ++next_[stream];
    if (awaited_[index] && can_go_on(stream)) share();
  }
}

/// Another stream may be able to go on beside the caller's.
void SideBySide::share() {
  Helpers* helpers = nullptr;
  {
    std::lock_guard lock(mutex_);
    helpers = std::exchange(helpers_, nullptr);
  }
  if (helpers != nullptr) {
    helpers->call(graph_.streams.size() - 1, [this] { work(); });
  } else {
    changed_.notify();
  }
}

/// Ends the run with the exception that is being handled, or because it was aborted; the first one counts.
void SideBySide::fail() {
  auto failure = std::current_exception();
  if (!failure) {
    const std::string text = graph_.description() + " was aborted";
    failure = std::make_exception_ptr(TaskError(ACL_ERROR_RT_MODEL_ABORT_NORMAL, text));
  }
  {
    std::lock_guard lock(mutex_);
    if (!failure_) failure_ = failure;
    failed_.store(true);
  }
  changed_.notify();
}

}  // namespace host_runtime
