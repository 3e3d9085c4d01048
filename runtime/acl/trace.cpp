#include "runtime/acl/trace.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "runtime/acl/capture.h"
#include "runtime/acl/graph.h"
#include "runtime/acl/stream.h"

namespace host_runtime::trace {

std::atomic<bool> recording{false};

namespace {

std::atomic<uint64_t> room{0};  // spans that may still be recorded
std::atomic<uint64_t> dropped{0};
std::atomic<uint64_t> launches{0};

/// Every text once, by its number.
struct Texts {
  std::mutex mutex;
  std::unordered_map<std::string, uint32_t> ids;
  std::vector<std::string> by_id;
};

Texts& texts() {
  static auto* const all = [] {
    auto* made = new Texts;
    made->ids.emplace("", 0);
    made->by_id.emplace_back();
    return made;
  }();
  return *all;
}

/// The spans of one thread. The lock is contended only while they are taken.
struct Buffer {
  std::mutex mutex;
  std::vector<Span> spans;
};

struct Buffers {
  std::mutex mutex;
  std::vector<std::shared_ptr<Buffer>> all;
};

Buffers& buffers() {
  static auto* const all = new Buffers;
  return *all;
}

Buffer& buffer_of_thread() {
  thread_local const std::shared_ptr<Buffer> own = [] {
    auto made = std::make_shared<Buffer>();
    std::lock_guard lock(buffers().mutex);
    buffers().all.push_back(made);
    return made;
  }();
  return *own;
}

void add(const Span& span) {
  uint64_t left = room.load(std::memory_order_relaxed);
  do {
    if (left == 0) {
      dropped.fetch_add(1, std::memory_order_relaxed);
      return;
    }
  } while (!room.compare_exchange_weak(left, left - 1, std::memory_order_relaxed));
  Buffer& own = buffer_of_thread();
  std::lock_guard lock(own.mutex);
  own.spans.push_back(span);
}

uint64_t thread_id() {
  thread_local const auto id = static_cast<uint64_t>(syscall(SYS_gettid));
  return id;
}

thread_local uint64_t launch_of_thread = 0;

}  // namespace

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

uint32_t text_id(const std::string& text) {
  thread_local std::unordered_map<std::string, uint32_t> known;
  const auto found = known.find(text);
  if (found != known.end()) return found->second;
  Texts& all = texts();
  std::lock_guard lock(all.mutex);
  const auto [entry, added] = all.ids.emplace(text, static_cast<uint32_t>(all.by_id.size()));
  if (added) all.by_id.push_back(text);
  known.emplace(text, entry->second);
  return entry->second;
}

Launch Launch::make(uint32_t label) {
  Launch made;
  made.id = launches.fetch_add(1, std::memory_order_relaxed) + 1;
  made.submitted = now();
  made.label = label;
  return made;
}

uint32_t Call::name_of(const Task& task) { return text_id(task.name()); }

void Call::finish() const {
  const uint32_t name = name_ != nullptr ? text_id(name_) : task_name_;
  add(Span{start_, now(), 0, launch_, Span::kCall, name, 0, -1, -1, 0, 0, 0, thread_id()});
}

Running::Running(const Stream& stream, const Task& task, const Launch& launch)
    : start_(!on()                     ? 0
             : launch.waits_since != 0 ? launch.waits_since
                                       : now()),
      stream_(stream),
      task_(task),
      launch_(launch),
      outer_(running_launch()) {
  run_for(launch.id);
}

void Running::finish() const {
  add(Span{start_, now(), launch_.submitted, launch_.id, Span::kTask, text_id(task_.name()), launch_.label,
           stream_.device.id, stream_.id, 0, 0, 0, 0});
}

uint64_t running_launch() { return launch_of_thread; }

void run_for(uint64_t launch) { launch_of_thread = launch; }

void node(const Graph& graph, const Node& node, const Task& task, int64_t start) {
  add(Span{start, now(), 0, launch_of_thread, Span::kNode, text_id(task.name()), node.label, graph.device.id,
           running_stream()->id, graph.id, static_cast<uint32_t>(node.index),
           static_cast<uint32_t>(node.stream), 0});
}

}  // namespace host_runtime::trace

using namespace host_runtime;

extern "C" {

/// Forgets what was recorded and begins to record, up to `limit` spans; what comes later is counted and
/// dropped.
HOST_RUNTIME_API void hostRuntimeTraceStart(uint64_t limit) {
  trace::recording.store(false);
  {
    std::lock_guard lock(trace::buffers().mutex);
    for (const auto& buffer : trace::buffers().all) {
      std::lock_guard own(buffer->mutex);
      buffer->spans.clear();
    }
  }
  trace::dropped.store(0);
  trace::room.store(limit);
  trace::recording.store(true);
}

HOST_RUNTIME_API void hostRuntimeTraceStop(void) { trace::recording.store(false); }

/// Moves up to `capacity` spans to `out`, in no order; returns how many there were before.
HOST_RUNTIME_API size_t hostRuntimeTraceTake(trace::Span* out, size_t capacity) {
  size_t total = 0;
  size_t taken = 0;
  std::lock_guard lock(trace::buffers().mutex);
  for (const auto& buffer : trace::buffers().all) {
    std::lock_guard own(buffer->mutex);
    auto& spans = buffer->spans;
    total += spans.size();
    const size_t count = out == nullptr ? 0 : std::min(spans.size(), capacity - taken);
    std::copy_n(spans.begin(), count, out + taken);
    spans.erase(spans.begin(), spans.begin() + static_cast<std::ptrdiff_t>(count));
    taken += count;
  }
  return total;
}

/// How many spans were dropped since the start.
HOST_RUNTIME_API uint64_t hostRuntimeTraceDropped(void) { return trace::dropped.load(); }

/// Writes up to `capacity` bytes of a text, without a zero at its end; returns its length.
HOST_RUNTIME_API size_t hostRuntimeTraceText(uint32_t id, char* out, size_t capacity) {
  trace::Texts& all = trace::texts();
  std::lock_guard lock(all.mutex);
  if (id >= all.by_id.size()) return 0;
  const std::string& text = all.by_id[id];
  if (out != nullptr) std::memcpy(out, text.data(), std::min(capacity, text.size()));
  return text.size();
}

/// What the tasks given to `stream` from now on belong to; during a capture, those of all its streams.
/// Returns the captured graph's id; 0 when the stream is not being captured.
HOST_RUNTIME_API uint32_t hostRuntimeLabel(aclrtStream handle, const char* label) {
  const auto stream = find_stream(handle, "hostRuntimeLabel");
  if (!stream) return 0;
  const uint32_t id = trace::text_id(label);
  std::lock_guard lock(capture_mutex());
  if (!stream->capture) {
    stream->label.store(id);
    return 0;
  }
  stream->capture->label = id;
  return stream->capture->graph->id;
}

/// What `count` nodes of a captured graph belong to, from node `first` on: in the place of what the capture's
/// labels said. Returns how many were labelled: none where the graph has fewer.
HOST_RUNTIME_API size_t hostRuntimeLabelNodes(uint32_t graph_id, size_t first, size_t count,
                                              const char* const* labels) {
  const auto graph = find_graph_by_id(graph_id);
  if (!graph || !graph->finished.load() || labels == nullptr) return 0;
  if (first > graph->nodes.size() || count > graph->nodes.size() - first) return 0;
  for (size_t i = 0; i < count; ++i) {
    graph->nodes[first + i].label = trace::text_id(labels[i]);
  }
  return count;
}

/// The nodes of a captured graph as spans without times; returns how many it has. `modelRI` as torch_npu has
/// it.
HOST_RUNTIME_API size_t hostRuntimeGraphNodes(uint32_t graph_id, trace::Span* out, size_t capacity) {
  const auto graph = find_graph_by_id(graph_id);
  if (!graph || !graph->finished.load()) return 0;
  const size_t count = out == nullptr ? 0 : std::min(capacity, graph->nodes.size());
  for (size_t i = 0; i < count; ++i) {
    const Node& node = graph->nodes[i];
    out[i] = trace::Span{0,
                         0,
                         0,
                         0,
                         trace::Span::kNode,
                         trace::text_id(graph->task_of(node)->name()),
                         node.label,
                         graph->device.id,
                         graph->streams[node.stream]->origin_id,
                         graph->id,
                         static_cast<uint32_t>(node.index),
                         static_cast<uint32_t>(node.stream),
                         0};
  }
  return graph->nodes.size();
}
}
