// Recording what ran when: calls of the host, tasks on streams, nodes of replayed graphs. While it is off,
// each hook is one test of a flag. runtime/trace.py reads what was recorded.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace host_runtime {

class Graph;
class Stream;
class Task;
struct Node;

namespace trace {

/// What runtime/trace.py reads as it lies in memory. Times are of the steady clock, in nanoseconds.
struct Span {
  enum Kind : uint32_t { kCall, kTask, kNode };
  int64_t start;
  int64_t end;
  int64_t submitted;  ///< of a task: when the host handed it over
  uint64_t launch;  ///< equal for a call of the host, the task it launched, and the nodes that this task ran
  uint32_t kind;
  uint32_t name;   ///< a text (text_id)
  uint32_t label;  ///< what a task or node belongs to, as the host was told, a text; 0 without
  int32_t device;  ///< -1 for calls of the host, as `stream`
  int32_t stream;  ///< of a node: the stream that the graph was launched on
  uint32_t graph;  ///< of a node: the graph's id, its place in the graph, and which of the graph's streams
  uint32_t node;
  uint32_t graph_stream;
  uint64_t thread;  ///< of a call
};

extern std::atomic<bool> recording;
inline bool on() { return recording.load(std::memory_order_relaxed); }

int64_t now();
/// A number for a text, the same for equal texts; 0 is the empty text.
uint32_t text_id(const std::string& text);

/// What the host knew when it handed over a task; all zero while nothing is recorded.
struct Launch {
  uint64_t id = 0;
  int64_t submitted = 0;
  uint32_t label = 0;
  int64_t waits_since = 0;  ///< of a task that waited without a thread
  static Launch next(uint32_t label) { return on() ? make(label) : Launch{}; }

  void begin_wait() {
    if (id != 0 && waits_since == 0) waits_since = now();
  }

 private:
  static Launch make(uint32_t label);
};

/// Records a call of the host from construction to destruction. `name` is only asked for while recording.
class Call {
 public:
  explicit Call(const char* name) : start_(on() ? now() : 0), name_(name) {}
  explicit Call(const Task& task) : start_(on() ? now() : 0), task_name_(start_ != 0 ? name_of(task) : 0) {}
  ~Call() {
    if (start_ != 0) finish();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void launched(const Launch& launch) { launch_ = launch.id; }

 private:
  static uint32_t name_of(const Task& task);
  void finish() const;

  const int64_t start_;
  const char* const name_ = nullptr;
  const uint32_t task_name_ = 0;
  uint64_t launch_ = 0;
};

/// The launch of the task that the calling thread runs, and what a thread that helps it says it runs.
uint64_t running_launch();
void run_for(uint64_t launch);

/// Records a task of a stream from construction to destruction.
class Running {
 public:
  Running(const Stream& stream, const Task& task, const Launch& launch);
  ~Running() {
    if (start_ != 0) finish();
    run_for(outer_);
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  void finish() const;

  const int64_t start_;
  const Stream& stream_;
  const Task& task_;
  const Launch& launch_;
  const uint64_t outer_;
};

/// Records a node of a graph that the calling thread's stream replays.
void node(const Graph& graph, const Node& node, const Task& task, int64_t start);

}  // namespace trace
}  // namespace host_runtime
