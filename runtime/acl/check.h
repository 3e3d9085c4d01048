// The checking mode: hooks that streams, events, graphs and memory call (docs/host_runtime.md). With the mode
// off each is one test of a flag.
#pragma once

#include <memory>

#include "runtime/acl/settings.h"
#include "runtime/acl/shadow.h"

namespace host_runtime {

class Event;
class Graph;
class Stream;
class Task;
struct Allocation;
struct Node;

namespace check {

inline bool on() { return settings().check != CheckMode::kOff; }

/// What the host knew when it handed over a task; null with the mode off.
std::unique_ptr<VectorClock> submitted();

/// Around a task on its stream: delays it at random, judges what it touches.
void before(Stream& stream, Task& task, const VectorClock* submitted);
void after(Stream& stream, Task& task);
/// Around one node of a graph that `stream` replays.
void begin_replay(Stream& stream, const Graph& graph);
void before_node(const Graph& graph, const Node& node, Task& task);
void after_node(const Graph& graph, const Node& node, Task& task);
void end_replay(Stream& stream, const Graph& graph);

/// The host waited until the stream had run everything.
void synchronized(const Stream& stream);
/// The host saw or waited for an event that was reached.
void synchronized(const Event& event);
/// The host reads and writes memory itself (aclrtMemcpy, aclrtMemset).
void host_access(const char* function, const void* read, size_t read_bytes, void* written,
                 size_t written_bytes);

/// Of pinned memory at the call of an asynchronous copy, compared when the copy is made.
uint64_t fingerprint(const void* memory, size_t bytes);
void source_changed(const std::string& what, const void* source);

void allocated(void* memory, size_t bytes);
/// True when the memory is kept for a while, poisoned; otherwise the caller gives it back.
bool freed(const Allocation& allocation);
void event_ended(const Event& event);
/// A stream, or a stream of a graph, is gone; its address may become another's.
void forget_actor(const void* owner);

}  // namespace check
}  // namespace host_runtime
