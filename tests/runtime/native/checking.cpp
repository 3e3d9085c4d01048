// The checking mode; run with NPU_COMPILER_HOST=check=on.
#include <cmath>
#include <cstring>
#include <thread>

#include "tests/runtime/native/check.h"

namespace {

using host_runtime::MemoryAccess;

struct Fixture {
  Fixture() {
    CHECK(host_runtime::checking());
    CHECK_OK(aclrtCreateStream(&first));
    CHECK_OK(aclrtCreateStream(&second));
    CHECK_OK(aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC));
    CHECK_OK(aclrtMalloc(&memory, kBytes, ACL_MEM_MALLOC_HUGE_FIRST));
    races = counter("races");
  }
  ~Fixture() {
    CHECK_OK(aclrtSynchronizeDevice());
    CHECK_OK(aclrtFree(memory));
    CHECK_OK(aclrtDestroyEvent(event));
    CHECK_OK(aclrtDestroyStream(first));
    CHECK_OK(aclrtDestroyStream(second));
  }
  uint64_t new_races() {
    CHECK_OK(aclrtSynchronizeDevice());
    const uint64_t found = counter("races") - races;
    races += found;
    return found;
  }
  static constexpr size_t kBytes = 8192;
  aclrtStream first = nullptr;
  aclrtStream second = nullptr;
  aclrtEvent event = nullptr;
  void* memory = nullptr;
  uint64_t races = 0;
};

aclError touch(aclrtStream stream, void* memory, size_t bytes, MemoryAccess::Mode mode,
               const std::string& name) {
  return host_runtime::submit(
      stream, std::make_shared<Operator>([] {}, name, std::vector<MemoryAccess>{{memory, bytes, mode}}));
}

void finds_missing_waits() {
  Fixture f;
  auto* bytes = static_cast<char*>(f.memory);
  CHECK_OK(touch(f.first, bytes, 4096, MemoryAccess::Mode::kWrite, "aclnnWriter"));
  CHECK_OK(touch(f.second, bytes + 4095, 10, MemoryAccess::Mode::kRead, "aclnnReader"));
  CHECK(f.new_races() == 1);
  // With the event wait, and for bytes that do not meet, there is nothing to find.
  CHECK_OK(touch(f.first, bytes, 4096, MemoryAccess::Mode::kWrite, "aclnnWriter"));
  CHECK_OK(touch(f.second, bytes + 4096, 10, MemoryAccess::Mode::kWrite, "aclnnOther"));
  CHECK_OK(aclrtRecordEvent(f.event, f.first));
  CHECK_OK(aclrtStreamWaitEvent(f.second, f.event));
  CHECK_OK(touch(f.second, bytes, 4096, MemoryAccess::Mode::kReadWrite, "aclnnReader"));
  CHECK(f.new_races() == 0);
  // Two readers may meet; a writer that did not wait for one of them may not.
  CHECK_OK(touch(f.first, bytes, 64, MemoryAccess::Mode::kRead, "aclnnReader"));
  CHECK_OK(touch(f.second, bytes, 64, MemoryAccess::Mode::kRead, "aclnnReader"));
  CHECK_OK(touch(f.second, bytes, 64, MemoryAccess::Mode::kWrite, "aclnnWriter"));
  CHECK(f.new_races() == 1);
  // Synchronising the host orders everything that is launched later.
  CHECK_OK(touch(f.first, bytes, 64, MemoryAccess::Mode::kWrite, "aclnnWriter"));
  CHECK(f.new_races() == 0);
}

void finds_missing_waits_in_graphs() {
  Fixture f;
  aclrtEvent back = nullptr;
  CHECK_OK(aclrtCreateEventExWithFlag(&back, ACL_EVENT_SYNC));
  for (const bool waits : {false, true}) {
    CHECK_OK(aclmdlRICaptureBegin(f.first, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
    CHECK_OK(aclrtRecordEvent(f.event, f.first));
    if (waits) CHECK_OK(touch(f.first, f.memory, 64, MemoryAccess::Mode::kWrite, "aclnnWriter"));
    if (waits) CHECK_OK(aclrtRecordEvent(f.event, f.first));
    CHECK_OK(aclrtStreamWaitEvent(f.second, f.event));
    if (!waits) CHECK_OK(touch(f.first, f.memory, 64, MemoryAccess::Mode::kWrite, "aclnnWriter"));
    CHECK_OK(touch(f.second, f.memory, 64, MemoryAccess::Mode::kRead, "aclnnReader"));
    CHECK_OK(aclrtRecordEvent(back, f.second));
    CHECK_OK(aclrtStreamWaitEvent(f.first, back));
    aclmdlRI graph = nullptr;
    CHECK_OK(aclmdlRICaptureEnd(f.first, &graph));
    for (int i = 0; i < 3; ++i) CHECK_OK(aclmdlRIExecuteAsync(graph, f.first));
    CHECK(f.new_races() == (waits ? 0U : 3U));
    CHECK_OK(aclmdlRIDestroy(graph));
  }
  CHECK_OK(aclrtDestroyEvent(back));
}

void finds_early_use_by_the_host() {
  Fixture f;
  void* pinned = nullptr;
  CHECK_OK(aclrtMallocHost(&pinned, Fixture::kBytes));
  std::memset(pinned, 1, Fixture::kBytes);
  // The host changes the source of a copy that was not made yet.
  CHECK_OK(launch(f.first, [] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }));
  CHECK_OK(aclrtMemcpyAsync(f.memory, Fixture::kBytes, pinned, Fixture::kBytes, ACL_MEMCPY_HOST_TO_DEVICE,
                            f.first));
  static_cast<char*>(pinned)[17] = 2;
  CHECK(f.new_races() == 1);
  // A blocking copy of memory that a stream still writes.
  CHECK_OK(touch(f.first, f.memory, 64, MemoryAccess::Mode::kWrite, "aclnnWriter"));
  CHECK_OK(aclrtMemcpy(pinned, 64, f.memory, 64, ACL_MEMCPY_DEVICE_TO_HOST));
  CHECK(f.new_races() == 1);
  CHECK_OK(aclrtMemcpy(pinned, 64, f.memory, 64, ACL_MEMCPY_DEVICE_TO_HOST));
  CHECK(f.new_races() == 0);
  CHECK_OK(aclrtFreeHost(pinned));
}

void poisons_memory() {
  Fixture f;
  auto* floats = static_cast<float*>(f.memory);
  CHECK(std::isnan(floats[0]) && std::isnan(floats[Fixture::kBytes / sizeof(float) - 1]));
  void* memory = nullptr;
  CHECK_OK(aclrtMalloc(&memory, 8192, ACL_MEM_MALLOC_HUGE_FIRST));
  std::memset(memory, 0, 8192);
  CHECK_OK(aclrtFree(memory));
  CHECK(std::isnan(*static_cast<volatile float*>(memory)));
  float workspace[4] = {};
  host_runtime::poison(workspace, sizeof workspace);
  CHECK(std::isnan(workspace[3]));
  // Freeing what a stream may still use.
  CHECK_OK(aclrtMalloc(&memory, 8192, ACL_MEM_MALLOC_HUGE_FIRST));
  CHECK_OK(touch(f.first, memory, 64, MemoryAccess::Mode::kWrite, "aclnnWriter"));
  while (true) {
    aclrtStreamStatus status{};
    CHECK_OK(aclrtStreamQuery(f.first, &status));
    if (status == ACL_STREAM_STATUS_COMPLETE) break;
  }
  CHECK_OK(aclrtFree(memory));
  CHECK(f.new_races() == 1);
}

}  // namespace

extern const TestCase kCheckingTests[] = {
    {"finds_missing_waits", finds_missing_waits},
    {"finds_missing_waits_in_graphs", finds_missing_waits_in_graphs},
    {"finds_early_use_by_the_host", finds_early_use_by_the_host},
    {"poisons_memory", poisons_memory},
    {nullptr, nullptr},
};
