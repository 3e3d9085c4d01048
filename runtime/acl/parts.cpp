#include "runtime/acl/parts.h"

#include <algorithm>
#include <utility>

#include "runtime/acl/counters.h"
#include "runtime/acl/wait.h"

namespace host_runtime {

bool OfferedParts::help() {
  bool did = false;
  if ((state_.fetch_add(1, std::memory_order_acquire) & kOpen) != 0) {
    const int64_t thread = joined_.fetch_add(1, std::memory_order_relaxed) + 1;
    did = thread < threads_ && run_lanes(thread);
  }
  state_.fetch_sub(1, std::memory_order_release);
  if (did) count(Counter::kHelpedKernels);
  return did;
}

bool OfferedParts::run(int64_t parts, int64_t threads, RunPart run, const void* kernel) {
  if (taken_.exchange(true, std::memory_order_acquire)) return false;
  offer(parts, threads, run, kernel);
  run_lanes(0);
  withdraw();
  const bool failed = failed_.exchange(false, std::memory_order_relaxed);
  const auto failure = failed ? std::exchange(failure_, nullptr) : nullptr;
  taken_.store(false, std::memory_order_release);
  if (failed) std::rethrow_exception(failure);
  return true;
}

void OfferedParts::offer(int64_t parts, int64_t threads, RunPart run, const void* kernel) {
  parts_ = parts;
  threads_ = threads;
  lane_count_ = std::min({parts, threads, kMostLanes});
  run_ = run;
  kernel_ = kernel;
  for (int64_t i = 0; i < lane_count_; ++i)
    lanes_[static_cast<size_t>(i)].next.store(i * parts / lane_count_, std::memory_order_relaxed);
  joined_.store(0, std::memory_order_relaxed);
  // Added: who came too late for the last kernel's parts may not be gone yet.
  state_.fetch_or(kOpen, std::memory_order_release);
}

/// Returns when nobody runs parts, or is about to, any more.
void OfferedParts::withdraw() {
  constexpr int kSpins = 1000;
  state_.fetch_and(~kOpen, std::memory_order_relaxed);
  for (int i = 0; state_.load(std::memory_order_acquire) != 0; ++i) i < kSpins ? relax_cpu() : give_way();
}

bool OfferedParts::run_lanes(int64_t thread) {
  bool did = false;
  for (int64_t i = 0; i < lane_count_; ++i) {
    const int64_t lane = (thread + i) % lane_count_;
    const int64_t end = (lane + 1) * parts_ / lane_count_;
    auto& next = lanes_[static_cast<size_t>(lane)].next;
    for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < end; did = true)
      run_part(part, thread);
  }
  return did;
}

void OfferedParts::run_part(int64_t part, int64_t thread) {
  if (failed_.load(std::memory_order_relaxed)) return;
  try {
    run_(kernel_, part, thread);
  } catch (...) {
    if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
  }
}

OfferedParts& offered_parts() {
  static OfferedParts parts;
  return parts;
}

void run_parts(int64_t parts, int64_t threads, RunPart run, const void* kernel) {
  if (parts > 1 && threads > 1 && offered_parts().run(parts, threads, run, kernel)) return;
  for (int64_t part = 0; part < parts; ++part) run(kernel, part, 0);
}

}  // namespace host_runtime
