// What one thread reads from memory at best: the floor of steps that read more weights than caches hold
// (benchmarks/devices.py).
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLine = 64;
using Line = uint64_t __attribute__((vector_size(kLine)));

struct Pass {
  double seconds;
  uint64_t sum;
};

/// Adds up all words, one line after the other. kAhead: each line is fetched so many bytes before it is read;
/// kTwice: and as many bytes before that, into the second level.
template <size_t kAhead, bool kTwice>
Pass read_all(const char* memory, size_t bytes) {
  const auto began = std::chrono::steady_clock::now();
  Line sums[4] = {};
  for (size_t at = 0; at < bytes; at += 4 * kLine) {
    for (size_t i = 0; i < 4; ++i) {
      const char* from = memory + at + i * kLine;
      if (kTwice) __builtin_prefetch(from + 2 * kAhead, 0, 2);
      if (kAhead > 0) __builtin_prefetch(from + kAhead, 0, kTwice ? 2 : 3);
      Line line;
      std::memcpy(&line, from, sizeof(line));
      sums[i] += line;
    }
  }
  const Line all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  uint64_t sum = 0;
  for (size_t i = 0; i < kLine / sizeof(uint64_t); ++i) sum += all[i];
  return {std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(), sum};
}

}  // namespace

/// Bytes per second of the quickest of `passes` rounds of every way of reading `bytes` (a multiple of 256),
/// in huge pages where Linux gives some; 0 without memory, or if what was read is not what had been written.
extern "C" double read_bandwidth(size_t bytes, int passes) {
  const size_t mapped = bytes + kHugePage;
  void* raw = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return 0;
  char* memory = static_cast<char*>(raw) + (kHugePage - reinterpret_cast<uintptr_t>(raw) % kHugePage);
  madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  const uint64_t right = bytes / sizeof(uint64_t) * uint64_t{0x0101010101010101};
  double seconds = std::numeric_limits<double>::infinity();
  bool wrong = false;
  for (int i = 0; i < passes; ++i) {
    for (const auto way :
         {&read_all<0, false>, &read_all<512, false>, &read_all<1024, false>, &read_all<1024, true>}) {
      const Pass pass = way(memory, bytes);
      seconds = std::min(seconds, pass.seconds);
      wrong = wrong || pass.sum != right;
    }
  }
  munmap(raw, mapped);
  return wrong ? 0 : static_cast<double>(bytes) / seconds;
}
