// Replays of graphs of several streams: the streams advance side by side, on threads of their own.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "runtime/acl/wait.h"

namespace host_runtime {

class Graph;
class Stream;
struct Node;

/// Threads that help a stream; they start when they are first called.
class Helpers {
 public:
  explicit Helpers(Stream& stream) : stream_(stream) {}
  ~Helpers();
  Helpers(const Helpers&) = delete;
  Helpers& operator=(const Helpers&) = delete;

  /// Lets `count` threads run the job once each, beside the caller, who is the stream's thread. The job may
  /// not throw. Once before each wait().
  void call(size_t count, std::function<void()> job);
  /// Returns when the job is done; threads that have not begun it are not waited for, and do not begin.
  void wait();

 private:
  enum class State { kIdle, kCalled, kRunning };
  struct Helper {
    std::thread thread;
    std::atomic<State> state{State::kIdle};
    WaitPoint changed;
  };
  void work(Helper& helper);

  Stream& stream_;
  std::vector<std::unique_ptr<Helper>> helpers_;
  std::function<void()> job_;
  uint64_t launch_ = 0;  ///< what the caller runs, for the trace
  std::atomic<bool> stop_{false};
};

/// Runs a graph's streams. Whoever is free takes a stream that can go on and runs it until it has to wait for
/// another one; so streams that only take turns stay on one thread, and helpers are called when two can go
/// on.
class SideBySide {
 public:
  /// Whether it is of use: several streams, and several cores for them.
  static bool pays(const Graph& graph);

  explicit SideBySide(Graph& graph);
  /// One run of all nodes; at most one at a time. Throws what the first node that fails throws.
  void run(Helpers& helpers);
  /// How many threads run nodes at the moment.
  size_t threads() const { return threads_.load(std::memory_order_relaxed); }

 private:
  void work();
  std::optional<size_t> pick() const;
  void go_on(size_t stream);
  bool may_run(const Node& node) const;
  bool can_go_on(size_t stream) const;
  bool over() const { return failed_.load() || left_.load() == 0; }
  void share();
  void fail();

  Graph& graph_;
  std::vector<bool> awaited_;  ///< by node: whether another stream waits for it
  bool polls_ = false;         ///< whether there are nodes that wait for something outside

  // Of the run in progress.
  std::unique_ptr<std::atomic<bool>[]> done_;  ///< by node
  std::atomic<size_t> left_{0};                ///< nodes
  std::atomic<size_t> threads_{0};             ///< that run nodes
  std::mutex mutex_;
  std::vector<size_t> next_;  ///< by stream: the place of its next node; its runner's, else guarded by mutex_
  std::vector<bool> taken_;   ///< by stream; guarded by mutex_
  Helpers* helpers_ = nullptr;  ///< null once they are called; guarded by mutex_
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;  ///< guarded by mutex_
  WaitPoint changed_;
};

}  // namespace host_runtime
