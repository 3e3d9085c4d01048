#include "runtime/acl/counters.h"

#include "runtime/acl/task.h"

namespace host_runtime {
namespace {

struct alignas(64) Slot {
  std::atomic<uint64_t> value{0};
};
Slot slots[static_cast<size_t>(Counter::kCount)];

const char* const names[] = {
    "host_synchronizations",
    "tasks",
    "graph_launches",
    "graph_nodes",
    "captures",
    "captured_tasks",
    "task_group_updates",
    "failed_tasks",
    "skipped_tasks",
    "races",
    "unchecked_tasks",
    "bytes_fetched_ahead",
    "helped_kernels",
};
static_assert(sizeof names / sizeof names[0] == static_cast<size_t>(Counter::kCount));

}  // namespace

void count(Counter counter, uint64_t by) {
  slots[static_cast<size_t>(counter)].value.fetch_add(by, std::memory_order_relaxed);
}

}  // namespace host_runtime

/// Writes up to `capacity` names and values; returns how many counters there are.
extern "C" HOST_RUNTIME_API size_t hostRuntimeCounters(const char** names, uint64_t* values,
                                                       size_t capacity) {
  constexpr auto total = static_cast<size_t>(host_runtime::Counter::kCount);
  for (size_t i = 0; i < total && i < capacity; ++i) {
    if (names != nullptr) names[i] = host_runtime::names[i];
    if (values != nullptr) values[i] = host_runtime::slots[i].value.load(std::memory_order_relaxed);
  }
  return total;
}
