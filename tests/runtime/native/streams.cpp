// Streams, events and memory through the C interface.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/runtime/native/check.h"

namespace {

void needs_a_device() {
  std::thread([] {
    int32_t device = 0;
    CHECK_CODE(aclrtGetDevice(&device), ACL_ERROR_RT_CONTEXT_NULL);
    aclrtStream stream = nullptr;
    CHECK_CODE(aclrtCreateStream(&stream), ACL_ERROR_RT_CONTEXT_NULL);
    CHECK(message_has("aclrtSetDevice"));
    CHECK_CODE(aclrtSetDevice(4711), ACL_ERROR_RT_INVALID_DEVICEID);
    CHECK(message_has("no device 4711"));
  }).join();
}

void keeps_order() {
  aclrtStream stream = nullptr;
  CHECK_OK(aclrtCreateStream(&stream));
  std::vector<int> seen;
  for (int i = 0; i < 5000; ++i) CHECK_OK(launch(stream, [&seen, i] { seen.push_back(i); }));
  CHECK_OK(aclrtSynchronizeStream(stream));
  CHECK(seen.size() == 5000);
  for (int i = 0; i < 5000; ++i) CHECK(seen[static_cast<size_t>(i)] == i);
  CHECK_OK(aclrtDestroyStream(stream));
  CHECK_CODE(aclrtSynchronizeStream(stream), ACL_ERROR_RT_INVALID_HANDLE);
}

void many_threads_submit() {
  aclrtStream stream = nullptr;
  CHECK_OK(aclrtCreateStream(&stream));
  std::atomic<int> run{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      CHECK_OK(aclrtSetDevice(0));
      for (int i = 0; i < 1000; ++i) CHECK_OK(launch(stream, [&] { ++run; }));
      CHECK_OK(aclrtSynchronizeStream(stream));
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(run == 4000);
  CHECK_OK(aclrtDestroyStream(stream));
}

/// A thread that waits may run the stream's tasks itself: still one at a time, and each once.
void waiting_threads_run_tasks() {
  aclrtStream stream = nullptr;
  CHECK_OK(aclrtCreateStream(&stream));
  int run = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      CHECK_OK(aclrtSetDevice(0));
      for (int i = 0; i < 500; ++i) {
        bool done = false;
        CHECK_OK(launch(stream, [&run, &done] { ++run, done = true; }));
        CHECK_OK(aclrtSynchronizeStream(stream));
        CHECK(done);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(run == 2000);

  const auto borrowed = [stream](bool with_deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));  // the stream's own thread sleeps by then
    bool found = false;
    CHECK_OK(launch(stream, [&found] { found = host_runtime::on_borrowed_thread(); }));
    CHECK_OK(with_deadline ? aclrtSynchronizeStreamWithTimeout(stream, 60000)
                           : aclrtSynchronizeStream(stream));
    CHECK(!host_runtime::on_borrowed_thread());
    return found;
  };
  int rounds = 0;
  while (!borrowed(false)) CHECK(++rounds < 1000);
  // Nothing that came later is run: it may wait for what the thread does next.
  for (int i = 0; i < 60; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    std::atomic<bool> borrows{false}, begun{false}, queued{false}, go{false};
    CHECK_OK(launch(stream, [&] {
      borrows = host_runtime::on_borrowed_thread();
      begun = true;
      while (!queued) std::this_thread::yield();
    }));
    std::thread other([&] {
      CHECK_OK(aclrtSetDevice(0));
      while (!begun) std::this_thread::yield();
      // Otherwise the wait may begin behind it, and be for it, too.
      if (borrows) {
        CHECK_OK(launch(stream, [&go] {
          while (!go) std::this_thread::yield();
        }));
      }
      queued = true;
    });
    CHECK_OK(aclrtSynchronizeStream(stream));
    go = true;
    other.join();
    CHECK_OK(aclrtSynchronizeStream(stream));
  }
  // A task can't be left when the time is over: with a deadline it stays with the stream's thread.
  for (int i = 0; i < 20; ++i) CHECK(!borrowed(true));
  CHECK_OK(aclrtDestroyStream(stream));
}

void errors_stick() {
  aclrtStream stream = nullptr;
  CHECK_OK(aclrtCreateStream(&stream));
  CHECK_OK(aclrtSetStreamFailureMode(stream, ACL_STOP_ON_FAILURE));
  aclrtEvent event = nullptr;
  CHECK_OK(aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC));
  std::atomic<bool> hold{true};
  std::atomic<bool> later{false};
  CHECK_OK(launch(stream, [&] {
    while (hold) std::this_thread::yield();
  }));
  CHECK_OK(launch(stream, [] { throw std::runtime_error("the matrix is not square"); }, "aclnnInverse"));
  CHECK_OK(launch(stream, [&] { later = true; }));
  CHECK_OK(aclrtRecordEvent(event, stream));
  hold = false;
  CHECK_CODE(aclrtSynchronizeStream(stream), ACL_ERROR_RT_AICORE_EXCEPTION);
  CHECK(message_has("aclnnInverse"));
  CHECK(!later);
  CHECK_CODE(aclrtSynchronizeStream(stream), ACL_ERROR_RT_AICORE_EXCEPTION);
  CHECK(message_has("the matrix is not square"));
  CHECK_CODE(launch(stream, [] {}), ACL_ERROR_RT_AICORE_EXCEPTION);
  // Whoever waits for the failed stream's event fails too, and names the cause.
  aclrtStream other = nullptr;
  CHECK_OK(aclrtCreateStream(&other));
  CHECK_OK(aclrtStreamWaitEvent(other, event));
  CHECK_CODE(aclrtSynchronizeStream(other), ACL_ERROR_RT_AICORE_EXCEPTION);
  CHECK(message_has("aclnnInverse"));
  CHECK_CODE(aclrtSynchronizeEvent(event), ACL_ERROR_RT_AICORE_EXCEPTION);
  CHECK_OK(aclrtDestroyEvent(event));
  CHECK_OK(aclrtDestroyStream(stream));
  CHECK_OK(aclrtDestroyStream(other));
}

void timeouts() {
  aclrtStream stream = nullptr;
  CHECK_OK(aclrtCreateStream(&stream));
  std::atomic<bool> hold{true};
  CHECK_OK(launch(stream, [&] {
    while (hold) std::this_thread::yield();
  }));
  CHECK_CODE(aclrtSynchronizeStreamWithTimeout(stream, 20), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
  aclrtStreamStatus status{};
  CHECK_OK(aclrtStreamQuery(stream, &status));
  CHECK(status == ACL_STREAM_STATUS_NOT_READY);
  hold = false;
  CHECK_OK(aclrtSynchronizeStream(stream));
  CHECK_OK(aclrtStreamQuery(stream, &status));
  CHECK(status == ACL_STREAM_STATUS_COMPLETE);
  CHECK_OK(aclrtDestroyStream(stream));
}

void events_order_streams() {
  aclrtStream first = nullptr;
  aclrtStream second = nullptr;
  aclrtEvent event = nullptr;
  CHECK_OK(aclrtCreateStream(&first));
  CHECK_OK(aclrtCreateStream(&second));
  CHECK_OK(aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC | ACL_EVENT_TIME_LINE));
  int value = 0;
  for (int round = 0; round < 200; ++round) {
    // The event is used again and again; each wait is for the record before it.
    CHECK_OK(launch(first, [&value, round] { value = round * 2 + 1; }));
    CHECK_OK(aclrtRecordEvent(event, first));
    CHECK_OK(aclrtStreamWaitEvent(second, event));
    CHECK_OK(launch(second, [&value, round] {
      CHECK(value == round * 2 + 1);
      value = round * 2 + 2;
    }));
    CHECK_OK(aclrtRecordEvent(event, second));
    CHECK_OK(aclrtStreamWaitEvent(first, event));
  }
  CHECK_OK(aclrtSynchronizeEvent(event));
  CHECK(value == 400);
  aclrtEventRecordedStatus status{};
  CHECK_OK(aclrtQueryEventStatus(event, &status));
  CHECK(status == ACL_EVENT_RECORDED_STATUS_COMPLETE);
  CHECK_OK(aclrtSynchronizeDevice());
  CHECK_OK(aclrtDestroyEvent(event));
  CHECK_CODE(aclrtRecordEvent(event, first), ACL_ERROR_RT_INVALID_HANDLE);
  CHECK_OK(aclrtDestroyStream(first));
  CHECK_OK(aclrtDestroyStream(second));
}

void event_times() {
  aclrtStream stream = nullptr;
  aclrtEvent begin = nullptr;
  aclrtEvent end = nullptr;
  aclrtEvent timeless = nullptr;
  CHECK_OK(aclrtCreateStream(&stream));
  CHECK_OK(aclrtCreateEventExWithFlag(&begin, ACL_EVENT_TIME_LINE));
  CHECK_OK(aclrtCreateEventExWithFlag(&end, ACL_EVENT_TIME_LINE));
  CHECK_OK(aclrtCreateEventExWithFlag(&timeless, ACL_EVENT_SYNC));
  float milliseconds = 0;
  CHECK_CODE(aclrtEventElapsedTime(&milliseconds, begin, end), ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID);
  CHECK_OK(aclrtRecordEvent(begin, stream));
  CHECK_OK(launch(stream, [] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }));
  CHECK_OK(aclrtRecordEvent(end, stream));
  CHECK_OK(aclrtRecordEvent(timeless, stream));
  CHECK_OK(aclrtSynchronizeStream(stream));
  CHECK_OK(aclrtEventElapsedTime(&milliseconds, begin, end));
  CHECK(milliseconds >= 20.0F && milliseconds < 2000.0F);
  CHECK_CODE(aclrtEventElapsedTime(&milliseconds, begin, timeless), ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID);
  for (aclrtEvent event : {begin, end, timeless}) CHECK_OK(aclrtDestroyEvent(event));
  CHECK_OK(aclrtDestroyStream(stream));
}

void external_events_and_values() {
  aclrtStream waiting = nullptr;
  aclrtStream other = nullptr;
  CHECK_OK(aclrtCreateStream(&waiting));
  CHECK_OK(aclrtCreateStream(&other));
  aclrtEvent event = nullptr;
  CHECK_CODE(aclrtCreateEventExWithFlag(&event, ACL_EVENT_EXTERNAL), ACL_ERROR_INVALID_PARAM);
  CHECK_OK(aclrtCreateEventWithFlag(&event, ACL_EVENT_EXTERNAL));
  std::atomic<int> rounds{0};
  for (int i = 0; i < 3; ++i) {
    CHECK_OK(aclrtStreamWaitEvent(waiting, event));
    CHECK_OK(aclrtResetEvent(event, waiting));
    CHECK_OK(launch(waiting, [&] { ++rounds; }));
    CHECK_CODE(aclrtSynchronizeStreamWithTimeout(waiting, 5), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
    CHECK(rounds == i);
    CHECK_OK(aclrtRecordEvent(event, other));
    CHECK_OK(aclrtSynchronizeStream(waiting));
    CHECK(rounds == i + 1);
  }
  void* value = nullptr;
  CHECK_OK(aclrtMallocAlign32(&value, 32, ACL_MEM_MALLOC_NORMAL_ONLY));
  CHECK_OK(aclrtMemset(value, 32, 0, 32));
  CHECK_OK(aclrtValueWait(value, 1, ACL_STREAM_WAIT_VALUE_EQ, waiting));
  CHECK_OK(launch(waiting, [&] { ++rounds; }));
  CHECK_CODE(aclrtSynchronizeStreamWithTimeout(waiting, 5), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
  CHECK_OK(aclrtValueWrite(value, 1, 0, other));
  CHECK_OK(aclrtSynchronizeStream(waiting));
  CHECK(rounds == 4);
  alignas(8) uint64_t on_host = 0;
  CHECK_CODE(aclrtValueWrite(&on_host, 1, 0, other), ACL_ERROR_INVALID_PARAM);
  CHECK_CODE(aclrtValueWrite(static_cast<char*>(value) + 4, 1, 0, other), ACL_ERROR_RT_ADDR_UNALIGNED);
  CHECK_OK(aclrtFree(value));
  CHECK_OK(aclrtDestroyEvent(event));
  CHECK_OK(aclrtDestroyStream(waiting));
  CHECK_OK(aclrtDestroyStream(other));
}

void memory_is_accounted() {
  size_t free_before = 0;
  size_t total = 0;
  CHECK_OK(aclrtGetMemInfo(ACL_HBM_MEM, &free_before, &total));
  void* memory = nullptr;
  const size_t size = size_t{1} << 30;
  CHECK_OK(aclrtMalloc(&memory, size, ACL_MEM_MALLOC_HUGE_FIRST));
  CHECK(reinterpret_cast<uintptr_t>(memory) % 512 == 0);
  size_t free_now = 0;
  CHECK_OK(aclrtGetMemInfo(ACL_HBM_MEM, &free_now, &total));
  CHECK(free_before - free_now == size);
  void* too_much = nullptr;
  CHECK_CODE(aclrtMalloc(&too_much, total, ACL_MEM_MALLOC_HUGE_FIRST), ACL_ERROR_RT_MEMORY_ALLOCATION);
  CHECK(message_has("out of memory: wanted"));
  aclrtPtrAttributes attributes{};
  CHECK_OK(aclrtPointerGetAttributes(static_cast<char*>(memory) + size - 1, &attributes));
  CHECK(attributes.location.type == ACL_MEM_LOCATION_TYPE_DEVICE && attributes.location.id == 0);
  CHECK_OK(aclrtFree(memory));
  CHECK_CODE(aclrtFree(memory), ACL_ERROR_INVALID_PARAM);
  CHECK_OK(aclrtGetMemInfo(ACL_HBM_MEM, &free_now, &total));
  CHECK(free_before == free_now);
}

void copies() {
  constexpr size_t kSize = 4096;
  void* device = nullptr;
  void* pinned = nullptr;
  std::vector<char> pageable(kSize, 3);
  aclrtStream stream = nullptr;
  CHECK_OK(aclrtCreateStream(&stream));
  CHECK_OK(aclrtMalloc(&device, kSize, ACL_MEM_MALLOC_HUGE_FIRST));
  CHECK_OK(aclrtMallocHost(&pinned, kSize));
  std::memset(pinned, 7, kSize);
  const uint64_t before = counter("host_synchronizations");
  CHECK_OK(aclrtMemcpyAsync(device, kSize, pinned, kSize, ACL_MEMCPY_HOST_TO_DEVICE, stream));
  CHECK(counter("host_synchronizations") == before);
  // Memory that is not pinned makes the copy block.
  CHECK_OK(aclrtMemcpyAsync(pageable.data(), kSize, device, kSize, ACL_MEMCPY_DEVICE_TO_HOST, stream));
  CHECK(counter("host_synchronizations") == before + 1);
  for (char byte : pageable) CHECK(byte == 7);
  CHECK_CODE(aclrtMemcpy(device, kSize - 1, pinned, kSize, ACL_MEMCPY_HOST_TO_DEVICE),
             ACL_ERROR_INVALID_PARAM);
  CHECK_CODE(aclrtMemcpy(device, kSize * 2, pinned, kSize * 2, ACL_MEMCPY_HOST_TO_DEVICE),
             ACL_ERROR_INVALID_PARAM);
  CHECK(message_has("beyond the end of its allocation"));
  CHECK_CODE(aclrtMemcpy(pageable.data(), kSize, device, kSize, ACL_MEMCPY_HOST_TO_DEVICE),
             ACL_ERROR_INVALID_PARAM);
  // 3 rows of 5 bytes, 8 apart, to rows 16 apart.
  for (size_t i = 0; i < 24; ++i) static_cast<char*>(pinned)[i] = static_cast<char>(i);
  CHECK_OK(aclrtMemset(device, kSize, 0, kSize));
  CHECK_OK(aclrtMemcpy2d(device, 16, pinned, 8, 5, 3, ACL_MEMCPY_HOST_TO_DEVICE));
  for (size_t row = 0; row < 3; ++row) {
    for (size_t column = 0; column < 16; ++column) {
      const char expected = column < 5 ? static_cast<char>(row * 8 + column) : 0;
      CHECK(static_cast<char*>(device)[row * 16 + column] == expected);
    }
  }
  CHECK_OK(aclrtFreeHost(pinned));
  CHECK_OK(aclrtFree(device));
  CHECK_OK(aclrtDestroyStream(stream));
}

size_t resident_bytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  long size = 0;
  long resident = 0;
  CHECK(file != nullptr && std::fscanf(file, "%ld %ld", &size, &resident) == 2);
  std::fclose(file);
  return static_cast<size_t>(resident) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

void zeroing_untouched_memory_costs_nothing() {
  void* memory = nullptr;
  const size_t size = size_t{40} << 30;
  CHECK_OK(aclrtMalloc(&memory, size, ACL_MEM_MALLOC_HUGE_FIRST));
  const size_t before = resident_bytes();
  host_runtime::zero_fill(static_cast<char*>(memory) + 100, size - 200);
  CHECK(resident_bytes() < before + (size_t{16} << 20));
  // What was written before is zero afterwards, and the edges outside of the range are not touched.
  auto* bytes = static_cast<unsigned char*>(memory);
  std::memset(bytes, 0xAB, size_t{8} << 20);
  host_runtime::zero_fill(bytes + 100, (size_t{8} << 20) - 200);
  CHECK(bytes[99] == 0xAB && bytes[100] == 0 && bytes[4 << 20] == 0);
  CHECK(bytes[(8 << 20) - 101] == 0 && bytes[(8 << 20) - 100] == 0xAB);
  CHECK_OK(aclrtFree(memory));
}

void virtual_memory() {
  constexpr size_t kGranule = size_t{2} << 20;
  size_t free_before = 0;
  size_t free_now = 0;
  size_t total = 0;
  CHECK_OK(aclrtGetMemInfo(ACL_HBM_MEM, &free_before, &total));
  aclrtPhysicalMemProp property{};
  property.location = {0, ACL_MEM_LOCATION_TYPE_DEVICE};
  void* addresses = nullptr;
  CHECK_OK(aclrtReserveMemAddress(&addresses, 8 * kGranule, 0, nullptr, 0));
  aclrtDrvMemHandle first = nullptr;
  aclrtDrvMemHandle second = nullptr;
  CHECK_CODE(aclrtMallocPhysical(&first, 4711, &property, 0), ACL_ERROR_INVALID_PARAM);
  CHECK_OK(aclrtMallocPhysical(&first, kGranule, &property, 0));
  CHECK_OK(aclrtMallocPhysical(&second, 2 * kGranule, &property, 0));
  auto* base = static_cast<char*>(addresses);
  CHECK_OK(aclrtMapMem(base, kGranule, 0, first, 0));
  CHECK_OK(aclrtMapMem(base + kGranule, 2 * kGranule, 0, second, 0));
  CHECK_CODE(aclrtMapMem(base, kGranule, 0, second, 0), ACL_ERROR_INVALID_PARAM);
  std::memset(base, 5, 3 * kGranule);
  CHECK_OK(aclrtGetMemInfo(ACL_HBM_MEM, &free_now, &total));
  CHECK(free_before - free_now == 3 * kGranule);
  CHECK_OK(aclrtUnmapMem(base));
  CHECK_OK(aclrtMapMem(base + 4 * kGranule, kGranule, 0, first, 0));
  CHECK(base[4 * kGranule] == 5 && base[5 * kGranule - 1] == 5);
  CHECK_OK(aclrtUnmapMem(base + 4 * kGranule));
  CHECK_OK(aclrtFreePhysical(first));
  CHECK_CODE(aclrtFreePhysical(first), ACL_ERROR_RT_INVALID_HANDLE);
  // Freed while mapped: the memory goes when the mapping does, and comes back as zeros.
  CHECK_OK(aclrtFreePhysical(second));
  CHECK(base[kGranule] == 5);
  CHECK_OK(aclrtUnmapMem(base + kGranule));
  CHECK_OK(aclrtGetMemInfo(ACL_HBM_MEM, &free_now, &total));
  CHECK(free_before == free_now);
  CHECK_OK(aclrtMallocPhysical(&first, 3 * kGranule, &property, 0));
  CHECK_OK(aclrtMapMem(base, 3 * kGranule, 0, first, 0));
  CHECK(base[0] == 0 && base[3 * kGranule - 1] == 0);
  CHECK_OK(aclrtUnmapMem(base));
  CHECK_OK(aclrtFreePhysical(first));
  CHECK_OK(aclrtReleaseMemAddress(addresses));
}

void callbacks() {
  aclrtStream stream = nullptr;
  CHECK_OK(aclrtCreateStream(&stream));
  int value = 0;
  CHECK_OK(launch(stream, [&] { value = 1; }));
  CHECK_OK(aclrtLaunchHostFunc(stream, [](void* v) { *static_cast<int*>(v) += 10; }, &value));
  CHECK_OK(
      aclrtLaunchCallback([](void* v) { *static_cast<int*>(v) *= 2; }, &value, ACL_CALLBACK_BLOCK, stream));
  CHECK_OK(aclrtSynchronizeStream(stream));
  CHECK(value == 22);
  CHECK_OK(aclrtDestroyStream(stream));
}

}  // namespace

extern const TestCase kStreamTests[] = {
    {"needs_a_device", needs_a_device},
    {"keeps_order", keeps_order},
    {"many_threads_submit", many_threads_submit},
    {"waiting_threads_run_tasks", waiting_threads_run_tasks},
    {"errors_stick", errors_stick},
    {"timeouts", timeouts},
    {"events_order_streams", events_order_streams},
    {"event_times", event_times},
    {"external_events_and_values", external_events_and_values},
    {"memory_is_accounted", memory_is_accounted},
    {"copies", copies},
    {"zeroing_untouched_memory_costs_nothing", zeroing_untouched_memory_costs_nothing},
    {"virtual_memory", virtual_memory},
    {"callbacks", callbacks},
    {nullptr, nullptr},
};
