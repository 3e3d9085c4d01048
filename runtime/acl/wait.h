// Waiting between threads: spin for a while, then sleep in the kernel.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>
#include <optional>

#include "runtime/acl/settings.h"

namespace host_runtime {

using Clock = std::chrono::steady_clock;
using Deadline = std::optional<Clock::time_point>;

/// CANN's timeouts: milliseconds, -1 for none.
inline Deadline deadline_after_ms(int64_t milliseconds) {
  if (milliseconds < 0) return std::nullopt;
  return Clock::now() + std::chrono::milliseconds(milliseconds);
}

inline void relax_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Lets threads wait until a condition over atomics holds. Whoever may make it true calls notify() after the
/// store; notify() is one atomic increment unless somebody sleeps.
class WaitPoint {
 public:
  void notify() {
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) {
      syscall(SYS_futex, &epoch_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }
  }

  /// Returns ready() as of the return: false only when the deadline passed first.
  template <typename Ready>
  bool wait(Ready ready, Deadline deadline = std::nullopt) {
    if (ready()) return true;
    const auto start = Clock::now();
    const bool is_ready = spin(ready, start, deadline) || sleep(ready, deadline);
    last_wait_.store(Clock::now() - start, std::memory_order_relaxed);
    return is_ready;
  }

 private:
  /// Of waits that are not known to be short. Being woken takes some tens of microseconds.
  static constexpr Clock::duration kShortSpin = std::chrono::microseconds(30);

  /// Who waits in a loop, for the next step or for its end, waits about as long each time.
  Clock::duration longest_spin() const {
    const Clock::duration most = std::chrono::microseconds(settings().spin_us);
    return last_wait_.load(std::memory_order_relaxed) < most ? most : std::min(most, kShortSpin);
  }

  template <typename Ready>
  bool spin(Ready& ready, Clock::time_point start, const Deadline& deadline) {
    auto until = start + longest_spin();
    if (deadline && *deadline < until) until = *deadline;
    // Without spare cores the thread that is waited for may need this one: give it away after the first
    // microsecond.
    const auto polite_from = start + std::chrono::microseconds(1);
    for (auto now = start; now < until; now = Clock::now()) {
      if (now < polite_from) {
        for (int i = 0; i < 8; ++i) relax_cpu();
      } else {
        syscall(SYS_sched_yield);
      }
      if (ready()) return true;
    }
    return false;
  }

  template <typename Ready>
  bool sleep(Ready& ready, const Deadline& deadline) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    bool is_ready = false;
    for (;;) {
      const uint32_t epoch = epoch_.load(std::memory_order_seq_cst);
      is_ready = ready();
      if (is_ready) break;
      timespec remaining{};
      if (deadline) {
        const auto left =
            std::chrono::duration_cast<std::chrono::nanoseconds>(*deadline - Clock::now()).count();
        if (left <= 0) break;
        remaining.tv_sec = left / 1000000000;
        remaining.tv_nsec = left % 1000000000;
      }
      syscall(SYS_futex, &epoch_, FUTEX_WAIT_PRIVATE, epoch, deadline ? &remaining : nullptr, nullptr, 0);
    }
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return is_ready;
  }

  std::atomic<uint32_t> epoch_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<Clock::duration> last_wait_{Clock::duration::max()};
};

}  // namespace host_runtime
