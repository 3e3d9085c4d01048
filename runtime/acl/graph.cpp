#include "runtime/acl/graph.h"

#include "runtime/acl/check.h"
#include "runtime/acl/counters.h"
#include "runtime/acl/handles.h"
#include "runtime/acl/trace.h"

namespace host_runtime {
namespace {

HandleTable<Graph>& graphs() {
  static auto* const table = new HandleTable<Graph>;
  return *table;
}

std::atomic<uint32_t> next_graph_id{1};

thread_local bool cached_weights = false;

/// While it lives, what replays_cached_weights() says on this thread.
class CachedWeights {
 public:
  explicit CachedWeights(bool cached) { cached_weights = cached; }
  ~CachedWeights() { cached_weights = false; }
  CachedWeights(const CachedWeights&) = delete;
  CachedWeights& operator=(const CachedWeights&) = delete;
};

}  // namespace

bool replays_cached_weights() { return cached_weights; }

std::shared_ptr<Graph> find_graph(aclmdlRI handle, const char* function) {
  if (handle == nullptr) {
    fail_null(function, "modelRI");
    return nullptr;
  }
  auto graph = graphs().find(handle);
  if (!graph) {
    fail(ACL_ERROR_RT_INVALID_HANDLE,
         std::string(function) + ": this graph does not exist (destroyed, or not a graph)");
  }
  return graph;
}

std::shared_ptr<Graph> find_graph_by_id(uint32_t id) {
  for (auto& graph : graphs().all()) {
    if (graph->id == id) return std::move(graph);
  }
  return nullptr;
}

aclmdlRI register_graph(std::shared_ptr<Graph> graph) { return graphs().add(std::move(graph)); }

std::shared_ptr<Graph> unregister_graph(aclmdlRI handle) { return graphs().remove(handle); }

Graph::Graph(Device& device) : device(device), id(next_graph_id.fetch_add(1)) {}

Graph::~Graph() {
  for (const auto& stream : streams) {
    check::forget_actor(stream.get());
    device.streams.give_back(stream->id);
  }
}

std::shared_ptr<GraphStream> Graph::add_stream(int32_t origin_id) {
  const int32_t stream_id = device.streams.take();
  if (stream_id < 0) {
    fail(ACL_ERROR_RT_NO_STREAM_RESOURCE,
         "graph " + std::to_string(id) + " needs another stream, and device " + std::to_string(device.id) +
             " has none left: all " + std::to_string(settings().streams) +
             " are held by streams and captured graphs; capture fewer sizes, or destroy graphs that are not "
             "replayed");
    return nullptr;
  }
  streams.push_back(std::make_shared<GraphStream>(GraphStream{stream_id, origin_id, {}, weak_from_this()}));
  return streams.back();
}

Node& Graph::add_node(size_t stream, TaskPtr task, aclmdlRITaskType type) {
  nodes.push_back(Node{std::move(task), stream, nodes.size(), type, -1, nullptr, "", true, false, 0});
  streams[stream]->nodes.push_back(nodes.back().index);
  return nodes.back();
}

void Graph::finish() {
  order_ = std::make_unique<std::atomic<Task*>[]>(nodes.size());
  for (Node& node : nodes) {
    order_[node.index].store(node.task.get(), std::memory_order_relaxed);
    node.blocks = dynamic_cast<WaitingTask*>(node.task.get()) != nullptr;
    if (node.blocks) blocking_.push_back(node.index);
  }
  fetch_ahead_ = FetchAhead::of(nodes);
  if (SideBySide::pays(*this)) side_by_side_ = std::make_unique<SideBySide>(*this);
  finished.store(true);
}

TaskPtr Graph::task_of(const Node& node) const {
  std::lock_guard lock(mutex_);
  return node.task;
}

std::string Graph::description() const {
  return "graph " + std::to_string(id) + (name.empty() ? "" : " (" + name + ")");
}

void Graph::rethrow(size_t index) const {
  const Node& node = nodes[index];
  const std::string where =
      "node " + std::to_string(index) + " (" + task_of(node)->name() + ") of " + description() + ": ";
  try {
    throw;
  } catch (const TaskError& error) {
    throw TaskError(error.code, where + error.what());
  } catch (const std::exception& error) {
    throw TaskError(ACL_ERROR_RT_AICORE_EXCEPTION, where + error.what());
  }
}

void Graph::run_range(size_t from, size_t to) {
  const CachedWeights said(fetch_ahead_ != nullptr && fetch_ahead_->stay_cached());
  const bool checked = check::on();
  const bool traced = trace::on();
  size_t i = from;
  try {
    for (; i < to; ++i) {
      Task* task = order_[i].load(std::memory_order_acquire);
      if (task == nullptr) continue;
      if (checked) check::before_node(*this, nodes[i], *task);
      const int64_t start = traced ? trace::now() : 0;
      task->run();
      if (traced) trace::node(*this, nodes[i], *task, start);
      if (checked) check::after_node(*this, nodes[i], *task);
    }
  } catch (...) {
    rethrow(i);
  }
}

bool Graph::ready(size_t index) const {
  const auto* waiting = dynamic_cast<WaitingTask*>(order_[index].load(std::memory_order_acquire));
  return waiting == nullptr || waiting->ready();
}

void Graph::run_in_order() {
  size_t done = 0;
  for (const size_t blocker : blocking_) {
    run_range(done, blocker);
    done = blocker;
    // With one stream, whatever is waited for comes from outside. With several it may be a later node of this
    // graph.
    if (streams.size() > 1 && !ready(blocker)) return run_cooperatively(done);
  }
  run_range(done, nodes.size());
}

/// Lets the graph's streams advance side by side, as far as the captured events between them allow.
void Graph::run_cooperatively(size_t from) {
  std::vector<bool> done(nodes.size(), false);
  std::fill(done.begin(), done.begin() + static_cast<std::ptrdiff_t>(from), true);
  std::vector<size_t> next(streams.size(), 0);
  size_t remaining = nodes.size() - from;
  auto pause = std::chrono::microseconds(1);
  while (remaining > 0) {
    bool progress = false;
    for (size_t s = 0; s < streams.size(); ++s) {
      const auto& own = streams[s]->nodes;
      for (; next[s] < own.size(); ++next[s]) {
        const Node& node = nodes[own[next[s]]];
        if (done[node.index]) continue;
        if (node.awaits >= 0 && !done[static_cast<size_t>(node.awaits)]) break;
        if (node.blocks && !ready(node.index)) break;
        run_range(node.index, node.index + 1);
        done[node.index] = true;
        progress = true;
        --remaining;
      }
    }
    if (progress) {
      pause = std::chrono::microseconds(1);
      continue;
    }
    if (abort.load()) throw TaskError(ACL_ERROR_RT_MODEL_ABORT_NORMAL, description() + " was aborted");
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(200));
  }
}

void Graph::run() {
  std::lock_guard serial(run_mutex_);
  if (has_retired_.load(std::memory_order_acquire)) {
    std::lock_guard lock(mutex_);
    retired_.clear();
    has_retired_.store(false, std::memory_order_release);
  }
  if (side_by_side_) {
    side_by_side_->run(running_stream()->helpers());
  } else if (blocking_.empty()) {
    run_range(0, nodes.size());
  } else {
    run_in_order();
  }
  count(Counter::kGraphNodes, nodes.size());
}

void Graph::replace(const TaskGroup& group, const std::vector<TaskPtr>& tasks) {
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < tasks.size(); ++i) {
    Node& node = nodes[group.nodes[i]];
    retired_.push_back(std::move(node.task));
    node.task = tasks[i];
    if (node.enabled) order_[node.index].store(node.task.get(), std::memory_order_release);
  }
  has_retired_.store(true, std::memory_order_release);
}

void Graph::set_enabled(Node& node, bool enabled) {
  std::lock_guard lock(mutex_);
  node.enabled = enabled;
  order_[node.index].store(enabled ? node.task.get() : nullptr, std::memory_order_release);
}

GraphLaunch::GraphLaunch(std::shared_ptr<Graph> graph) : graph_(std::move(graph)) {
  graph_->launches_pending.fetch_add(1);
}

GraphLaunch::~GraphLaunch() {
  graph_->launches_pending.fetch_sub(1);
  graph_->launch_done.notify();
}

void GraphLaunch::run() {
  Stream* stream = running_stream();
  check::begin_replay(*stream, *graph_);
  graph_->run();
  check::end_replay(*stream, *graph_);
  // Another thread's cache is not the one that the stream's thread fills.
  if (!on_borrowed_thread()) stream->between_replays().replayed(graph_->fetch_ahead());
}

std::string GraphLaunch::name() const { return "aclmdlRIExecuteAsync"; }

std::string GraphLaunch::arguments_json() const {
  return "{\"graph\": " + std::to_string(graph_->id) +
         ", \"nodes\": " + std::to_string(graph_->nodes.size()) + "}";
}

void UpdateTask::run() {
  if (const auto graph = update_.group->graph.lock()) graph->replace(*update_.group, update_.tasks);
  count(Counter::kTaskGroupUpdates);
}

}  // namespace host_runtime
