// Waiting between threads, as a stream's thread and who waits for a stream do.
#include <atomic>
#include <chrono>
#include <thread>

#include "runtime/acl/wait.h"
#include "tests/runtime/native/check.h"

namespace {

using host_runtime::Clock;

bool comes(const std::function<bool()>& what, std::chrono::milliseconds within) {
  for (const auto end = Clock::now() + within; Clock::now() < end;) {
    if (what()) return true;
  }
  return false;
}

/// In a loop the next notice comes as soon as the last one did, even if that was for another thread: who is
/// woken in vain spins again before it sleeps.
void who_is_woken_in_vain_spins_again() {
  host_runtime::WaitPoint point(host_runtime::Spin::kLoop);
  std::atomic<bool> over{false};
  std::thread waiting([&] { CHECK(point.wait([&over] { return over.load(); })); });
  bool spins = false;
  for (int i = 0; i < 500 && !spins; ++i) {
    CHECK(comes([&] { return point.has_sleepers(); }, std::chrono::seconds(10)));
    point.notify();
    spins = comes([&] { return !point.has_sleepers(); }, std::chrono::milliseconds(5));
  }
  CHECK(spins);
  CHECK(comes([&] { return point.has_sleepers(); }, std::chrono::seconds(10)));
  over = true;
  point.notify();
  waiting.join();
}

void a_deadline_ends_a_wait_that_is_woken_in_vain() {
  host_runtime::WaitPoint point(host_runtime::Spin::kLoop);
  std::atomic<bool> over{false};
  std::thread other([&] {
    while (!over) {
      point.notify();
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  });
  const auto start = Clock::now();
  CHECK(!point.wait([] { return false; }, start + std::chrono::milliseconds(30)));
  CHECK(Clock::now() - start >= std::chrono::milliseconds(30));
  over = true;
  other.join();
}

}  // namespace

extern const TestCase kWaitTests[] = {
    {"who_is_woken_in_vain_spins_again", who_is_woken_in_vain_spins_again},
    {"a_deadline_ends_a_wait_that_is_woken_in_vain", a_deadline_ends_a_wait_that_is_woken_in_vain},
    {nullptr, nullptr},
};
