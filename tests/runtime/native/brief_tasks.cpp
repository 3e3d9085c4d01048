// Tasks that are run by whoever finds that they can be, where their stream's thread sleeps.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/runtime/native/check.h"

namespace {

/// The calling thread's number in /proc.
std::string thread_number() { return std::to_string(gettid()); }

/// How often the thread was switched to, or -1 while it does not sleep.
long switches_of(const std::string& thread) {
  std::ifstream file("/proc/self/task/" + thread + "/status");
  long switches = 0;
  bool sleeps = false;
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("State:\tS", 0) == 0) sleeps = true;
    const size_t colon = line.find("ctxt_switches:");
    if (colon != std::string::npos) switches += std::stol(line.substr(colon + 14));
  }
  return sleeps ? switches : -1;
}

/// Waits until the thread sleeps for good.
long asleep(const std::string& thread) {
  for (long before = -1;;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const long now = switches_of(thread);
    if (now >= 0 && now == before) return now;
    before = now;
  }
}

class Streams {
 public:
  explicit Streams(size_t count) : streams(count) {
    for (aclrtStream& stream : streams) CHECK_OK(aclrtCreateStream(&stream));
  }
  ~Streams() {
    for (aclrtStream stream : streams) CHECK_OK(aclrtDestroyStream(stream));
  }
  Streams(const Streams&) = delete;
  Streams& operator=(const Streams&) = delete;

  std::vector<aclrtStream> streams;
};

class Events {
 public:
  explicit Events(size_t count) : events(count) {
    for (aclrtEvent& event : events) CHECK_OK(aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC));
  }
  ~Events() {
    for (aclrtEvent event : events) CHECK_OK(aclrtDestroyEvent(event));
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;

  std::vector<aclrtEvent> events;
};

/// Keeps a stream busy until it is let go.
struct Gate {
  std::atomic<bool> open{false};
  void hold(aclrtStream stream) {
    CHECK_OK(launch(stream, [this] {
      while (!open) std::this_thread::yield();
    }));
  }
};

/// The way of a step's tokens to the host: a stream that waits for another one and copies a little.
void a_stream_that_waits_and_copies_needs_no_thread() {
  if (host_runtime::checking()) return;  // each task is then judged on its stream's thread
  const Streams made(2);
  const Events events(2);
  const aclrtStream compute = made.streams[0];
  const aclrtStream copies = made.streams[1];
  const aclrtEvent ready = events.events[0];
  const aclrtEvent copied = events.events[1];
  std::string thread;
  CHECK_OK(launch(copies, [&thread] { thread = thread_number(); }));
  CHECK_OK(aclrtSynchronizeStreamWithTimeout(copies,
                                             60000));  // with a deadline tasks stay with the stream's thread
  void* device = nullptr;
  void* pinned = nullptr;
  CHECK_OK(aclrtMallocAlign32(&device, 64, ACL_MEM_MALLOC_NORMAL_ONLY));
  CHECK_OK(aclrtMallocHost(&pinned, 64));
  const long before = asleep(thread);
  for (int round = 1; round <= 100; ++round) {
    Gate gate;
    gate.hold(compute);
    CHECK_OK(launch(compute, [device, round] { std::memset(device, round, 64); }));
    CHECK_OK(aclrtRecordEvent(ready, compute));
    CHECK_OK(aclrtStreamWaitEvent(copies, ready));
    CHECK_OK(aclrtMemcpyAsync(pinned, 64, device, 64, ACL_MEMCPY_DEVICE_TO_HOST, copies));
    CHECK_OK(aclrtRecordEvent(copied, copies));
    gate.open = true;
    CHECK_OK(aclrtSynchronizeEvent(copied));
    CHECK(static_cast<const char*>(pinned)[63] == round);
  }
  // Woken now and then: where the next round's wait comes before the last round's turn has ended.
  CHECK(asleep(thread) - before < 25);
  // What takes its time is its thread's work, whoever lets it go on.
  Gate gate;
  gate.hold(compute);
  CHECK_OK(aclrtRecordEvent(ready, compute));
  CHECK_OK(aclrtStreamWaitEvent(copies, ready));
  std::string later;
  CHECK_OK(launch(copies, [&later] { later = thread_number(); }));
  gate.open = true;
  CHECK_OK(aclrtSynchronizeStreamWithTimeout(copies, 60000));
  CHECK(later == thread);
  CHECK_OK(aclrtFreeHost(pinned));
  CHECK_OK(aclrtFree(device));
}

/// Nothing is before it, so it is done when the call returns; another thread would only now have begun.
void a_brief_task_of_an_idle_stream_runs_at_once() {
  if (host_runtime::checking()) return;
  const Streams made(1);
  const aclrtStream stream = made.streams[0];
  void* device = nullptr;
  CHECK_OK(aclrtMallocAlign32(&device, 128, ACL_MEM_MALLOC_NORMAL_ONLY));
  auto* bytes = static_cast<char*>(device);
  for (int round = 1; round <= 100; ++round) {
    bytes[0] = static_cast<char>(round);
    CHECK_OK(aclrtMemcpyAsync(bytes + 64, 64, bytes, 64, ACL_MEMCPY_DEVICE_TO_DEVICE, stream));
    CHECK(bytes[64] == round);
    Gate gate;
    gate.hold(stream);
    CHECK_OK(aclrtMemcpyAsync(bytes, 64, bytes + 64, 64, ACL_MEMCPY_DEVICE_TO_DEVICE, stream));
    bytes[64] = 0;  // before the copy reads it: the gate holds it
    gate.open = true;
    CHECK_OK(aclrtSynchronizeStream(stream));
    CHECK(bytes[0] == 0);
  }
  CHECK_OK(aclrtFree(device));
}

/// Each of them finds its own in order, whoever runs what.
void two_threads_give_brief_tasks_to_one_stream() {
  const Streams made(1);
  const aclrtStream stream = made.streams[0];
  void* device = nullptr;
  CHECK_OK(aclrtMallocAlign32(&device, 2 * 192, ACL_MEM_MALLOC_NORMAL_ONLY));
  const auto give = [&](char* bytes) {
    CHECK_OK(aclrtSetDevice(0));
    for (int round = 1; round <= 2000; ++round) {
      const char value = static_cast<char>(round % 100);
      CHECK_OK(launch(stream, [bytes, value] { std::memset(bytes, value, 64); }));
      for (int i = 0; i < 2; ++i)
        CHECK_OK(aclrtMemcpyAsync(bytes + 64 * (i + 1), 64, bytes + 64 * i, 64, ACL_MEMCPY_DEVICE_TO_DEVICE,
                                  stream));
      if (round % 3 == 0) continue;
      CHECK_OK(aclrtSynchronizeStream(stream));
      CHECK(bytes[191] == value);
      CHECK_OK(aclrtMemcpyAsync(bytes, 64, bytes + 64, 64, ACL_MEMCPY_DEVICE_TO_DEVICE, stream));
    }
  };
  std::thread other(give, static_cast<char*>(device) + 192);
  give(static_cast<char*>(device));
  other.join();
  CHECK_OK(aclrtSynchronizeStream(stream));
  CHECK_OK(aclrtFree(device));
}

/// Each stream waits for the one before it; nothing runs before the first is let go, and then all do, in
/// order.
void one_lets_the_next_go_on() {
  const Streams made(8);
  const Events events(8);
  for (int round = 0; round < 50; ++round) {
    std::vector<size_t> seen;
    Gate gate;
    gate.hold(made.streams[0]);
    for (size_t i = 0; i < made.streams.size(); ++i) {
      if (i > 0) CHECK_OK(aclrtStreamWaitEvent(made.streams[i], events.events[i - 1]));
      // Every other stream has nothing of its own to do.
      if (i % 2 == 0) CHECK_OK(launch(made.streams[i], [&seen, i] { seen.push_back(i); }));
      CHECK_OK(aclrtRecordEvent(events.events[i], made.streams[i]));
    }
    aclrtStreamStatus status{};
    CHECK_OK(aclrtStreamQuery(made.streams.back(), &status));
    CHECK(status == ACL_STREAM_STATUS_NOT_READY && seen.empty());
    gate.open = true;
    CHECK_OK(aclrtSynchronizeEvent(events.events.back()));
    CHECK((seen == std::vector<size_t>{0, 2, 4, 6}));
  }
}

/// Waits that are given while what they wait for is reached: none is missed.
void no_record_is_missed() {
  const Streams made(2);
  const Events events(2);
  for (int round = 0; round < 3000; ++round) {
    for (size_t i = 0; i < 2; ++i) {
      if (round % 3 == 0) CHECK_OK(launch(made.streams[i], [] {}));
      CHECK_OK(aclrtRecordEvent(events.events[i], made.streams[i]));
      CHECK_OK(aclrtStreamWaitEvent(made.streams[1 - i], events.events[i]));
    }
    if (round % 7 == 0) CHECK_OK(aclrtSynchronizeEvent(events.events[round % 2]));
    if (round % 100 == 0)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));  // both threads sleep by then
  }
  for (aclrtStream stream : made.streams) CHECK_OK(aclrtSynchronizeStream(stream));
}

void a_stream_can_go_while_it_waits() {
  const Streams made(1);
  const Events events(1);
  aclrtStream waiting = nullptr;
  CHECK_OK(aclrtCreateStream(&waiting));
  Gate gate;
  gate.hold(made.streams[0]);
  CHECK_OK(aclrtRecordEvent(events.events[0], made.streams[0]));
  CHECK_OK(aclrtStreamWaitEvent(waiting, events.events[0]));
  std::atomic<bool> run{false};
  CHECK_OK(launch(waiting, [&run] { run = true; }));
  std::thread opener([&gate] {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    gate.open = true;
  });
  CHECK_OK(aclrtDestroyStream(waiting));  // what it was given is done before
  CHECK(run && gate.open);
  opener.join();
}

void who_waits_for_a_stream_that_fails_fails() {
  const Streams made(2);
  const Events events(1);
  CHECK_OK(aclrtSetStreamFailureMode(made.streams[0], ACL_STOP_ON_FAILURE));
  Gate gate;
  gate.hold(made.streams[0]);
  CHECK_OK(
      launch(made.streams[0], [] { throw std::runtime_error("the matrix is not square"); }, "aclnnInverse"));
  CHECK_OK(aclrtRecordEvent(events.events[0], made.streams[0]));
  CHECK_OK(aclrtStreamWaitEvent(made.streams[1], events.events[0]));
  gate.open = true;
  CHECK_CODE(aclrtSynchronizeStream(made.streams[1]), ACL_ERROR_RT_AICORE_EXCEPTION);
  CHECK(message_has("aclnnInverse"));
}

}  // namespace

extern const TestCase kBriefTaskTests[] = {
    {"a_stream_that_waits_and_copies_needs_no_thread", a_stream_that_waits_and_copies_needs_no_thread},
    {"a_brief_task_of_an_idle_stream_runs_at_once", a_brief_task_of_an_idle_stream_runs_at_once},
    {"two_threads_give_brief_tasks_to_one_stream", two_threads_give_brief_tasks_to_one_stream},
    {"one_lets_the_next_go_on", one_lets_the_next_go_on},
    {"no_record_is_missed", no_record_is_missed},
    {"a_stream_can_go_while_it_waits", a_stream_can_go_while_it_waits},
    {"who_waits_for_a_stream_that_fails_fails", who_waits_for_a_stream_that_fails_fails},
    {nullptr, nullptr},
};
