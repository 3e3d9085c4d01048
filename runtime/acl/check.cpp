#include "runtime/acl/check.h"

#include <cstring>
#include <deque>
#include <random>

#include "runtime/acl/counters.h"
#include "runtime/acl/event.h"
#include "runtime/acl/graph.h"
#include "runtime/acl/memory.h"
#include "runtime/acl/value.h"

namespace host_runtime {

bool checking() { return check::on(); }

void poison(void* memory, size_t bytes) {
  if (check::on() && memory != nullptr) std::memset(memory, 0xFF, bytes);
}

namespace check {
namespace {

constexpr size_t kLargestPoisoned = size_t{256} << 20;
constexpr size_t kQuarantineBytes = size_t{256} << 20;
constexpr uint64_t kHost = 0;
constexpr int kBarsOfDelay = 4;  // one task in so many is delayed

/// Everything the mode knows. Tasks of all streams come through here one at a time; speed is not the point.
struct State {
  std::mutex mutex;
  std::map<const void*, uint64_t> actors;  // stream, or graph and its stream -> number
  uint64_t next_actor = 1;
  std::map<uint64_t, VectorClock> clocks;
  std::map<const Event*, VectorClock> events;
  std::map<const void*, VectorClock> values;  // by address of aclrtValueWrite
  ShadowMemory shadow;
  std::map<const Stream*, std::mt19937_64> delays;
  std::deque<Allocation> quarantine;
  size_t quarantined = 0;
};

State& state() {
  static auto* const all = new State;
  return *all;
}

// All of the following are called with the mutex held.

uint64_t actor_of(const void* owner) {
  State& s = state();
  const auto [found, is_new] = s.actors.try_emplace(owner, s.next_actor);
  if (is_new) ++s.next_actor;
  return found->second;
}

VectorClock& clock_of(uint64_t actor) { return state().clocks[actor]; }

uint64_t step(uint64_t actor) { return ++clock_of(actor)[actor]; }

/// Tells the user, and in the mode "fatal" fails the task at hand.
void report(const std::string& text) {
  count(Counter::kRaces);
  std::fprintf(stderr, "[host runtime] check: %s\n", text.c_str());
  if (settings().check == CheckMode::kFatal) throw TaskError(ACL_ERROR_RT_INTERNAL_ERROR, text);
}

std::string place(uintptr_t address) {
  char text[128];
  const auto allocation = MemoryMap::instance().find(reinterpret_cast<void*>(address));
  if (allocation && allocation->on_device()) {
    std::snprintf(text, sizeof text, "0x%zx (device %d, byte %zu of an allocation of %zu)",
                  static_cast<size_t>(address), allocation->device->id,
                  static_cast<size_t>(address - allocation->base), allocation->bytes);
  } else {
    std::snprintf(text, sizeof text, "0x%zx (host memory)", static_cast<size_t>(address));
  }
  return text;
}

std::string describe(const Conflict& conflict, const std::string& now, bool writes) {
  return now + (writes ? " writes " : " reads ") + place(conflict.address) + ", which " +
         conflict.earlier.what + (conflict.earlier_wrote ? " writes" : " reads") +
         ", and nothing orders the two: an event wait or a synchronisation is missing";
}

void judge(uint64_t actor, const std::string& what, const std::vector<MemoryAccess>& accesses) {
  const PastAccess now{actor, step(actor), what};
  std::optional<Conflict> first;
  bool writes = false;
  for (const MemoryAccess& access : accesses) {
    auto conflict = state().shadow.access(access, now, clock_of(actor));
    if (!conflict || first) continue;
    first = std::move(conflict);
    writes = access.mode != MemoryAccess::Mode::kRead;
  }
  if (first) report(describe(*first, what, writes));
}

bool orders_only(const Task& task) {
  return dynamic_cast<const ControlTask*>(&task) != nullptr ||
         dynamic_cast<const CapturedEventTask*>(&task) != nullptr;
}

/// Events and values carry clocks from who records or writes to who waits.
void synchronize_actors(uint64_t actor, const Task& task) {
  State& s = state();
  const auto pass = [&](auto& table, auto key, bool gives) {
    if (gives) {
      table[key] = clock_of(actor);
      step(actor);
    } else {
      join(clock_of(actor), table[key]);
    }
  };
  if (const auto* event = dynamic_cast<const EventTask*>(&task)) {
    if (event->action != EventTask::Action::kReset)
      pass(s.events, event->event.get(), event->action == EventTask::Action::kRecord);
  } else if (const auto* captured = dynamic_cast<const CapturedEventTask*>(&task)) {
    pass(s.events, captured->event.get(), captured->action == EventTask::Action::kRecord);
  } else if (const auto* value = dynamic_cast<const ValueTask*>(&task)) {
    pass(s.values, static_cast<const void*>(value->address), !value->is_wait);
  }
}

/// An order-making task that waits joins what it waited for, so it is entered after it ran; see
/// Stream::run_one.
void enter(uint64_t actor, const std::string& where, const Task& task) {
  if (orders_only(task)) return synchronize_actors(actor, task);
  const auto accesses = task.accesses();
  const std::string name = task.name();
  const bool should_tell = name.compare(0, 5, "aclnn") == 0 || name.compare(0, 4, "Hccl") == 0;
  if (accesses.empty() && should_tell) count(Counter::kUncheckedTasks);
  judge(actor, name + " on " + where, accesses);
}

std::string place_in(const Graph& graph, const Node& node) {
  return "node " + std::to_string(node.index) + " of " + graph.description();
}

const void* owner_of(const Graph& graph, const Node& node) { return graph.streams[node.stream].get(); }

}  // namespace

std::unique_ptr<VectorClock> submitted() {
  if (!on()) return nullptr;
  std::lock_guard lock(state().mutex);
  auto known = std::make_unique<VectorClock>(clock_of(kHost));
  step(kHost);
  return known;
}

void before(Stream& stream, Task& task, const VectorClock* submitted) {
  if (!on()) return;
  std::chrono::microseconds delay{0};
  {
    std::lock_guard lock(state().mutex);
    if (submitted != nullptr) join(clock_of(actor_of(&stream)), *submitted);
    auto [random, is_new] =
        state().delays.try_emplace(&stream, settings().seed * 1000003 + static_cast<uint64_t>(stream.id));
    if (settings().delay_us > 0 && random->second() % kBarsOfDelay == 0) {
      delay = std::chrono::microseconds(random->second() % settings().delay_us);
    }
  }
  if (delay.count() > 0) std::this_thread::sleep_for(delay);
  // Records and writes give away what the stream has done before others can see them; waits learn after they
  // ran.
  const bool waits =
      dynamic_cast<WaitingTask*>(&task) != nullptr && !static_cast<WaitingTask&>(task).gives_order();
  if (waits || dynamic_cast<GraphLaunch*>(&task) != nullptr) return;
  std::lock_guard lock(state().mutex);
  enter(actor_of(&stream), stream.description(), task);
}

void after(Stream& stream, Task& task) {
  if (!on()) return;
  const auto* waiting = dynamic_cast<WaitingTask*>(&task);
  if (waiting == nullptr || waiting->gives_order()) return;
  std::lock_guard lock(state().mutex);
  synchronize_actors(actor_of(&stream), task);
}

void begin_replay(Stream& stream, const Graph& graph) {
  if (!on()) return;
  std::lock_guard lock(state().mutex);
  const VectorClock& launching = clock_of(actor_of(&stream));
  for (const auto& own : graph.streams) join(clock_of(actor_of(own.get())), launching);
  step(actor_of(&stream));
}

void before_node(const Graph& graph, const Node& node, Task& task) {
  if (!on()) return;
  const auto* waiting = dynamic_cast<WaitingTask*>(&task);
  if (waiting != nullptr && !waiting->gives_order()) return;
  std::lock_guard lock(state().mutex);
  enter(actor_of(owner_of(graph, node)), place_in(graph, node), task);
}

void after_node(const Graph& graph, const Node& node, Task& task) {
  if (!on()) return;
  const auto* waiting = dynamic_cast<WaitingTask*>(&task);
  if (waiting == nullptr || waiting->gives_order()) return;
  std::lock_guard lock(state().mutex);
  synchronize_actors(actor_of(owner_of(graph, node)), task);
}

void end_replay(Stream& stream, const Graph& graph) {
  if (!on()) return;
  std::lock_guard lock(state().mutex);
  // Every stream of a graph was joined to the first, or its capture would have been refused.
  join(clock_of(actor_of(&stream)), clock_of(actor_of(graph.streams.front().get())));
}

void synchronized(const Stream& stream) {
  if (!on()) return;
  std::lock_guard lock(state().mutex);
  join(clock_of(kHost), clock_of(actor_of(&stream)));
}

void synchronized(const Event& event) {
  if (!on()) return;
  std::lock_guard lock(state().mutex);
  const auto found = state().events.find(&event);
  if (found != state().events.end()) join(clock_of(kHost), found->second);
}

void host_access(const char* function, const void* read, size_t read_bytes, void* written,
                 size_t written_bytes) {
  if (!on()) return;
  std::lock_guard lock(state().mutex);
  judge(
      kHost, std::string(function) + " (the host)",
      {{read, read_bytes, MemoryAccess::Mode::kRead}, {written, written_bytes, MemoryAccess::Mode::kWrite}});
}

uint64_t fingerprint(const void* memory, size_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(memory);
  uint64_t hash = 14695981039346656037ULL;  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ byte[i]) * 1099511628211ULL;
  return hash;
}

void source_changed(const std::string& what, const void* source) {
  std::lock_guard lock(state().mutex);
  report("the source of " + what + " at " + place(reinterpret_cast<uintptr_t>(source)) +
         " was changed by the host between the call and the copy: synchronise the stream, or an event "
         "recorded after "
         "the copy, before writing to the buffer again");
}

void allocated(void* memory, size_t bytes) {
  if (on() && bytes <= kLargestPoisoned) std::memset(memory, 0xFF, bytes);
}

bool freed(const Allocation& allocation) {
  if (!on()) return false;
  State& s = state();
  std::lock_guard lock(s.mutex);
  const auto conflict = s.shadow.forget(allocation.base, allocation.bytes, clock_of(kHost));
  if (conflict) {
    count(Counter::kRaces);
    std::fprintf(stderr,
                 "[host runtime] check: aclrtFree of %zu bytes at 0x%zx of device %d, which %s may still %s: "
                 "synchronise first\n",
                 allocation.bytes, static_cast<size_t>(allocation.base), allocation.device->id,
                 conflict->earlier.what.c_str(), conflict->earlier_wrote ? "write" : "read");
  }
  if (allocation.kind == Allocation::Kind::kShared || allocation.charged > kQuarantineBytes) return false;
  std::memset(reinterpret_cast<void*>(allocation.base), 0xFF, allocation.bytes);
  s.quarantine.push_back(allocation);
  s.quarantined += allocation.charged;
  while (s.quarantined > kQuarantineBytes) {
    s.quarantined -= s.quarantine.front().charged;
    release_pages(s.quarantine.front());
    s.quarantine.pop_front();
  }
  return true;
}

void event_ended(const Event& event) {
  if (!on()) return;
  std::lock_guard lock(state().mutex);
  state().events.erase(&event);
}

void forget_actor(const void* owner) {
  if (!on()) return;
  std::lock_guard lock(state().mutex);
  // The number stays used: what the actor did must go on being ordered by clocks that know it.
  state().actors.erase(owner);
  state().delays.erase(static_cast<const Stream*>(owner));
}

}  // namespace check
}  // namespace host_runtime
