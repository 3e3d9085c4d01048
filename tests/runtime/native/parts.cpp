// Parts of kernels that waiting threads do.
#include "runtime/acl/parts.h"

#include <sched.h>

#include <atomic>
#include <chrono>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/runtime/native/check.h"

namespace {

using host_runtime::run_parts;
using Clock = std::chrono::steady_clock;

struct Stream {
  Stream() { CHECK_OK(aclrtCreateStream(&handle)); }
  ~Stream() { CHECK_OK(aclrtDestroyStream(handle)); }
  aclError submit(std::function<void()> kernel) const {
    return host_runtime::submit(handle, std::make_shared<Operator>(std::move(kernel)));
  }
  aclrtStream handle = nullptr;
};

/// A kernel of two parts that ends when both have begun, so by two threads, or after `patience`.
struct Meeting {
  void run(std::chrono::milliseconds patience = std::chrono::milliseconds(50)) {
    begun = 0;
    const auto end = Clock::now() + patience;
    run_parts(2, 2, [&](int64_t part, int64_t thread) {
      CHECK(thread == 0 || thread == 1);
      threads[part] = thread;
      begun.fetch_add(1);
      while (begun.load() < 2 && Clock::now() < end) sched_yield();
      met[part] = begun.load() == 2 && Clock::now() < end;
    });
  }
  bool took_place() const { return met[0] && met[1] && threads[0] != threads[1]; }

  std::atomic<int> begun{0};
  int64_t threads[2] = {};
  bool met[2] = {};
};

/// Whether what is tried takes place at some time: threads sleep when they have waited for long.
bool sooner_or_later(const std::function<bool()>& what) {
  for (const auto end = Clock::now() + std::chrono::seconds(60); Clock::now() < end;) {
    if (what()) return true;
  }
  return false;
}

void who_waits_for_a_stream_helps_with_its_kernel() {
  const Stream stream;
  const uint64_t before = counter("helped_kernels");
  CHECK(sooner_or_later([&] {
    Meeting meeting;
    CHECK_OK(stream.submit([&] { meeting.run(); }));
    CHECK_OK(aclrtSynchronizeStream(stream.handle));
    return meeting.took_place();
  }));
  CHECK(counter("helped_kernels") > before);
}

void who_waits_for_an_event_helps_with_the_kernel_before_it() {
  const Stream stream;
  aclrtEvent event = nullptr;
  CHECK_OK(aclrtCreateEvent(&event));
  CHECK(sooner_or_later([&] {
    Meeting meeting;
    CHECK_OK(stream.submit([&] { meeting.run(); }));
    CHECK_OK(aclrtRecordEvent(event, stream.handle));
    CHECK_OK(aclrtSynchronizeEvent(event));
    return meeting.took_place();
  }));
  CHECK_OK(aclrtDestroyEvent(event));
}

/// Each part once, whoever does it, and no two at a time on one of the `threads`.
void every_part_is_done_once() {
  constexpr int kStreams = 3;
  const std::vector<Stream> streams(kStreams);
  for (int64_t parts : {1, 2, 3, 64, 65, 500}) {
    for (int64_t threads : {1, 2, 5, 100}) {
      for (int again = 0; again < 20; ++again) {
        std::vector<std::vector<std::atomic<int>>> done;
        for (int s = 0; s < kStreams; ++s) done.emplace_back(static_cast<size_t>(parts));
        for (int s = 0; s < kStreams; ++s) {
          CHECK_OK(streams[s].submit([&done, s, parts, threads] {
            std::vector<std::atomic<bool>> busy(static_cast<size_t>(threads));
            run_parts(parts, threads, [&](int64_t part, int64_t thread) {
              CHECK(thread >= 0 && thread < threads);
              CHECK(!busy[static_cast<size_t>(thread)].exchange(true));
              done[static_cast<size_t>(s)][static_cast<size_t>(part)].fetch_add(1);
              busy[static_cast<size_t>(thread)].store(false);
            });
            for (const auto& count : done[static_cast<size_t>(s)]) CHECK(count.load() == 1);
          }));
        }
        std::vector<std::thread> waiting;
        for (int s = 1; s < kStreams; ++s) {
          waiting.emplace_back([&, s] {
            CHECK_OK(aclrtSetDevice(0));
            CHECK_OK(aclrtSynchronizeStream(streams[s].handle));
          });
        }
        CHECK_OK(aclrtSynchronizeStream(streams[0].handle));
        for (auto& thread : waiting) thread.join();
      }
    }
  }
}

/// The failure of a part, on whichever thread, is the kernel's; the next kernel is not touched by it.
void a_part_that_fails_fails_the_kernel() {
  bool by_helper = false;
  CHECK(sooner_or_later([&] {
    for (const int64_t failing : {0, 1}) {
      const Stream stream;
      Meeting meeting;
      CHECK_OK(stream.submit([&, failing] {
        run_parts(2, 2, [&](int64_t part, int64_t thread) {
          meeting.begun.fetch_add(1);
          for (const auto end = Clock::now() + std::chrono::milliseconds(20);
               meeting.begun.load() < 2 && Clock::now() < end;)
            sched_yield();
          if (part != failing) return;
          by_helper = by_helper || thread == 1;
          throw std::out_of_range("part " + std::to_string(part));
        });
      }));
      CHECK_CODE(aclrtSynchronizeStream(stream.handle), ACL_ERROR_RT_AICORE_EXCEPTION);
      CHECK(message_has("part " + std::to_string(failing)));
    }
    return by_helper;
  }));
  const Stream stream;
  std::atomic<int> done{0};
  CHECK_OK(stream.submit([&] { run_parts(8, 2, [&](int64_t, int64_t) { done.fetch_add(1); }); }));
  CHECK_OK(aclrtSynchronizeStream(stream.handle));
  CHECK(done.load() == 8);
}

/// Parts of a kernel that offers parts itself stay on their thread.
void parts_within_parts() {
  const Stream stream;
  std::atomic<int> done{0};
  CHECK_OK(stream.submit([&] {
    run_parts(4, 2, [&](int64_t, int64_t) { run_parts(4, 2, [&](int64_t, int64_t) { done.fetch_add(1); }); });
  }));
  CHECK_OK(aclrtSynchronizeStream(stream.handle));
  CHECK(done.load() == 16);
}

}  // namespace

extern const TestCase kPartTests[] = {
    {"who_waits_for_a_stream_helps_with_its_kernel", who_waits_for_a_stream_helps_with_its_kernel},
    {"who_waits_for_an_event_helps_with_the_kernel_before_it",
     who_waits_for_an_event_helps_with_the_kernel_before_it},
    {"every_part_is_done_once", every_part_is_done_once},
    {"a_part_that_fails_fails_the_kernel", a_part_that_fails_fails_the_kernel},
    {"parts_within_parts", parts_within_parts},
    {nullptr, nullptr},
};
