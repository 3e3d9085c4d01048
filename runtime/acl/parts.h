// The parts of a kernel's work, done by its stream's thread and by threads that wait meanwhile. No thread is
// started for them, so that kernels take no core from those who work: Python, other streams, other ranks.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>

#include "runtime/acl/task.h"

namespace host_runtime {

/// Does part `part` of a kernel's work on the `thread`th of those that take part, 0 for the one that asked.
/// May not wait.
using RunPart = void (*)(const void* kernel, int64_t part, int64_t thread);

/// Does parts 0 to `parts` - 1 of a kernel's work, each once, and returns when all are done. `threads` is how
/// many threads may take part, the calling one included. Throws what the first part that fails throws; the
/// parts that nobody has begun are then not done.
HOST_RUNTIME_API void run_parts(int64_t parts, int64_t threads, RunPart run, const void* kernel);

/// The same with anything that can be called.
template <typename Run>
void run_parts(int64_t parts, int64_t threads, const Run& run) {
  const RunPart call = [](const void* kernel, int64_t part, int64_t thread) {
    (*static_cast<const Run*>(kernel))(part, thread);
  };
  run_parts(parts, threads, call, &run);
}

/// Parts of one kernel at a time that other threads may take.
class HOST_RUNTIME_API OfferedParts {
 public:
  /// Whether there are some.
  bool any() const { return (state_.load(std::memory_order_relaxed) & kOpen) != 0; }
  /// Does parts until none is left. Returns whether it did one.
  bool help();

  /// Has the parts done, with whoever helps. Returns false, and does nothing, while another kernel's are
  /// offered.
  bool run(int64_t parts, int64_t threads, RunPart run, const void* kernel);

 private:
  static constexpr size_t kLine = 64;
  static constexpr uint64_t kOpen = uint64_t{1} << 63;
  static constexpr int64_t kMostLanes = 64;

  /// Neighbouring parts, which one thread takes before it looks for others: memory is read in order.
  struct alignas(kLine) Lane {
    std::atomic<int64_t> next{0};
  };

  void offer(int64_t parts, int64_t threads, RunPart run, const void* kernel);
  void withdraw();
  bool run_lanes(int64_t thread);
  void run_part(int64_t part, int64_t thread);

  // One line, of which the rest comes with the first.
  alignas(kLine) std::atomic<uint64_t> state_{
      0};  ///< kOpen, and how many threads may be about to read the rest
  std::atomic<int64_t> joined_{0};
  int64_t parts_ = 0;
  int64_t threads_ = 0;
  int64_t lane_count_ = 0;
  RunPart run_ = nullptr;
  const void* kernel_ = nullptr;
  std::array<Lane, kMostLanes> lanes_;
  alignas(kLine) std::atomic<bool> taken_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;  ///< of who made failed_ true
};

/// Those of the process.
HOST_RUNTIME_API OfferedParts& offered_parts();

}  // namespace host_runtime
