// A captured graph: its tasks, and how they are run again.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "runtime/acl/event.h"
#include "runtime/acl/fetch_ahead.h"
#include "runtime/acl/side_by_side.h"
#include "runtime/acl/stream.h"

namespace host_runtime {

class Graph;

/// What aclrtTaskGrp points to: nodes of a graph whose tasks can be replaced.
struct TaskGroup {
  std::weak_ptr<Graph> graph;
  std::vector<size_t> nodes;
  bool updating = false;  // guarded by capture_mutex()
};

/// An update of a task group in progress on a stream: the tasks that will replace the group's.
struct GroupUpdate {
  std::shared_ptr<TaskGroup> group;
  std::vector<TaskPtr> tasks;
  aclError error = ACL_SUCCESS;  ///< the first refusal; the end of the update then fails too
};

/// One captured task. What aclmdlRITask points to.
struct Node {
  TaskPtr task;  // guarded by the graph's mutex once the capture has ended
  size_t stream;
  size_t index;
  aclmdlRITaskType type;
  int64_t awaits = -1;  ///< of a wait for an event captured in this graph: the node that records it
  std::shared_ptr<TaskGroup> group;
  std::string operator_info;
  bool enabled = true;
  bool blocks = false;  ///< may wait for something outside of the graph
  uint32_t label = 0;   ///< what it belongs to, by the capture's labels (trace.h)
};

/// A stream of the graph's own: captured streams go on living without the graph.
struct GraphStream {
  int32_t id;         ///< from the device's stream budget
  int32_t origin_id;  ///< of the stream that was captured
  std::vector<size_t> nodes;
  std::weak_ptr<Graph> graph;
};

class Graph : public std::enable_shared_from_this<Graph> {
 public:
  explicit Graph(Device& device);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  /// While capturing. Null when the device has no stream left (error set).
  std::shared_ptr<GraphStream> add_stream(int32_t origin_id);
  Node& add_node(size_t stream, TaskPtr task, aclmdlRITaskType type);
  void finish();

  /// Runs every node once: in the order of capture, or several streams side by side. One run at a time.
  void run();
  /// Replaces the tasks of a group; runs in progress take what they find.
  void replace(const TaskGroup& group, const std::vector<TaskPtr>& tasks);
  /// Takes nodes out of, or into, the following runs.
  void set_enabled(Node& node, bool enabled);

  std::string debug_json(bool verbose) const;
  std::string description() const;
  TaskPtr task_of(const Node& node) const;

  const std::shared_ptr<const FetchAhead>& fetch_ahead() const { return fetch_ahead_; }

  Device& device;
  const uint32_t id;
  std::string name;
  std::deque<Node> nodes;
  std::vector<std::shared_ptr<GraphStream>> streams;
  std::set<std::shared_ptr<TaskGroup>> groups;
  std::atomic<bool> finished{false};
  std::atomic<bool> abort{false};
  std::atomic<uint64_t> launches_pending{0};
  WaitPoint launch_done;
  std::mutex callbacks_mutex;
  std::vector<std::pair<aclrtCallback, void*>> destroy_callbacks;

 private:
  friend class SideBySide;
  /// Whether a node that blocks would go on at once.
  bool ready(size_t index) const;
  void run_in_order();
  void run_cooperatively(size_t from);
  void run_range(size_t from, size_t to);
  [[noreturn]] void rethrow(size_t index) const;

  mutable std::mutex mutex_;
  std::mutex run_mutex_;
  std::unique_ptr<std::atomic<Task*>[]> order_;    ///< by node; null for a disabled node
  std::shared_ptr<const FetchAhead> fetch_ahead_;  ///< null without weights
  std::vector<size_t> blocking_;                   ///< nodes that may block, ascending
  std::unique_ptr<SideBySide> side_by_side_;       ///< null where the nodes run in the order of capture
  std::vector<TaskPtr> retired_;  ///< replaced tasks that a run may still be using; guarded by mutex_
  std::atomic<bool> has_retired_{false};
};

/// The task that replays a graph on a stream.
class GraphLaunch final : public ControlTask {
 public:
  explicit GraphLaunch(std::shared_ptr<Graph> graph);
  ~GraphLaunch() override;
  void run() override;
  void skip(const StreamFailure&) override {}
  std::string name() const override;
  std::string arguments_json() const override;

 private:
  std::shared_ptr<Graph> graph_;
};

/// The task that puts a finished update into its graph, in the update stream's order.
class UpdateTask final : public Task, public BriefTask {
 public:
  explicit UpdateTask(GroupUpdate update) : update_(std::move(update)) {}
  void run() override;
  std::string name() const override { return "aclmdlRICaptureTaskUpdateEnd"; }
  bool brief() const override { return true; }

 private:
  GroupUpdate update_;
};

/// Null, with the error set, when the handle names no graph.
std::shared_ptr<Graph> find_graph(aclmdlRI handle, const char* function);
/// Null when no live graph has this id.
std::shared_ptr<Graph> find_graph_by_id(uint32_t id);
aclmdlRI register_graph(std::shared_ptr<Graph> graph);
std::shared_ptr<Graph> unregister_graph(aclmdlRI handle);

/// Text as the inside of a JSON string.
std::string json_escaped(const std::string& text);

}  // namespace host_runtime
