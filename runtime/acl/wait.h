// Waiting between threads: spin for a while, then sleep in the kernel.
#pragma once

#include <linux/futex.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>
#include <optional>
#include <utility>

#include "runtime/acl/parts.h"
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

inline void give_way() { syscall(SYS_sched_yield); }

/// Cores that this process may use.
int usable_cores();

/// How long a wait spins at most. kShort: where nothing is known of waits here. kLoop: where a loop waits,
/// for its next step or for the end of one; as long as the setting `spin_us` allows, if the last wait was
/// over by then. kThread: the same, by the calling thread's last wait at points of this kind, where each step
/// of a loop has a point of its own.
enum class Spin { kShort, kLoop, kThread };

/// Lets threads wait until a condition over atomics holds. Whoever may make it true calls notify() after the
/// store; notify() is one atomic increment unless somebody sleeps.
class WaitPoint {
 public:
  explicit WaitPoint(Spin spin = Spin::kShort) : spin_(spin) {}

  void notify() {
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) {
      syscall(SYS_futex, &epoch_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }
  }

  /// Whether notify() would have to wake somebody.
  bool has_sleepers() const { return sleepers_.load(std::memory_order_seq_cst) != 0; }

  /// Returns ready() as of the return: false only when the deadline passed first.
  template <typename Ready>
  bool wait(Ready ready, Deadline deadline = std::nullopt) {
    if (ready()) return true;
    for (auto start = Clock::now();;) {
      bool crowded = false;
      const bool is_ready = spin(ready, start, deadline, crowded) || sleep(ready, deadline);
      const auto now = Clock::now();
      last_wait().store(crowded ? Clock::duration::max() : now - start, std::memory_order_relaxed);
      if (is_ready || now >= deadline.value_or(Clock::time_point::max())) return is_ready;
      start = now;  // woken for what another thread took: in a loop the next comes as soon
    }
  }

 private:
  /// Being woken takes some tens of microseconds.
  static constexpr Clock::duration kShortSpin = std::chrono::microseconds(30);
  /// A yield that takes longer may have given the core to another thread, which wants it more.
  static constexpr Clock::duration kOwnYield = std::chrono::microseconds(50);
  /// The thread whose kernel was helped with has a core: nobody needs this one.
  static constexpr Clock::duration kBetweenKernels = std::chrono::microseconds(20);

  /// The right to spin for long: one core is left to those that work.
  class LongSpin {
   public:
    LongSpin() : granted(spinning_.fetch_add(1) + 1 < usable_cores()) {}
    ~LongSpin() { spinning_.fetch_sub(1); }
    LongSpin(const LongSpin&) = delete;
    LongSpin& operator=(const LongSpin&) = delete;
    const bool granted;

   private:
    inline static std::atomic<int> spinning_{0};
  };

  std::atomic<Clock::duration>& last_wait() {
    thread_local std::atomic<Clock::duration> of_thread{Clock::duration::max()};
    return spin_ == Spin::kThread ? of_thread : last_wait_;
  }

  template <typename Ready>
  bool spin(Ready& ready, Clock::time_point& start, const Deadline& deadline, bool& crowded) {
    const Clock::duration most = std::chrono::microseconds(settings().spin_us);
    const Clock::time_point latest = deadline.value_or(Clock::time_point::max());
    const Clock::duration briefly = std::min(most, kShortSpin);
    bool helped = false;
    if (spin_until(start, briefly, latest, ready, crowded, helped)) return true;
    if (spin_ == Spin::kShort || crowded) return false;
    if (!helped && last_wait().load(std::memory_order_relaxed) >= most) return false;
    const LongSpin long_spin;
    return long_spin.granted && spin_until(start, most, latest, ready, crowded, helped);
  }

  /// Spins until `most` behind the start, and helps with kernels meanwhile: the wait starts anew then, as the
  /// next kernel may be as near. Gives the core away after the first microsecond: the thread that is waited
  /// for may need it. `crowded`: another thread took it, so the spinning ended.
  template <typename Ready>
  static bool spin_until(Clock::time_point& start, Clock::duration most, Clock::time_point latest,
                         Ready& ready, bool& crowded, bool& helped) {
    auto now = Clock::now();
    auto polite_from = now + std::chrono::microseconds(1);
    int64_t gave_way = -1;  // as of before the yields; -1: not asked
    bool refused = false;   // as many threads as may already take part
    while (now < std::min(latest, start + most) && !crowded) {
      if (now < polite_from) {
        for (int i = 0; i < 8 && (refused || !offered_parts().any()); ++i) relax_cpu();
      } else {
        if (gave_way < 0) gave_way = times_gave_way();
        give_way();
      }
      if (ready()) return true;
      const auto last = std::exchange(now, Clock::now());
      const bool offered = offered_parts().any();
      refused = offered && !offered_parts().help();
      if (offered && !refused) {
        helped = true;
        start = now = Clock::now();
        polite_from = now + kBetweenKernels;
        gave_way = -1;
      } else {
        crowded = gave_way >= 0 && now - last > kOwnYield && times_gave_way() != gave_way;
      }
    }
    return false;
  }

  /// How often the calling thread left its core to another one while it could have run. A virtual machine's
  /// core that its host takes away is not counted: there is nobody to make room for. An earlier yield
  /// of the same wait that was short is: to ask behind each would take longer than the yield.
  static int64_t times_gave_way() {
    rusage usage{};
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nivcsw;
  }

  /// Until notify() is called, or the deadline. Returns ready().
  template <typename Ready>
  bool sleep(Ready& ready, const Deadline& deadline) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t epoch = epoch_.load(std::memory_order_seq_cst);
    bool is_ready = ready();
    while (!is_ready && epoch_.load(std::memory_order_seq_cst) == epoch) {
      timespec remaining{};
      if (deadline) {
        const auto left =
            std::chrono::duration_cast<std::chrono::nanoseconds>(*deadline - Clock::now()).count();
        if (left <= 0) break;
        remaining.tv_sec = left / 1000000000;
        remaining.tv_nsec = left % 1000000000;
      }
      syscall(SYS_futex, &epoch_, FUTEX_WAIT_PRIVATE, epoch, deadline ? &remaining : nullptr, nullptr, 0);
      is_ready = ready();
    }
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return is_ready;
  }

  const Spin spin_;
  std::atomic<uint32_t> epoch_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<Clock::duration> last_wait_{Clock::duration::max()};
};

}  // namespace host_runtime
