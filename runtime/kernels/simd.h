// Helpers of kernels that GCC vectorises: run-time choice of instruction set, and bfloat16 as arithmetic sees
// it.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// One body, compiled for each instruction set and chosen when the library is loaded. Sanitizers cannot run
// before the loader has resolved such functions, so their builds take the default one; other architectures
// have one anyway.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FOR_EACH_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_ISA
#endif
#define INLINE_KERNEL inline __attribute__((always_inline))

namespace aclnn::kernels {

/// bfloat16 bits to float, without branches.
INLINE_KERNEL float widen(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

/// Float to bfloat16 bits, to nearest, ties to even; NaN stays NaN. As c10::BFloat16, without branches.
INLINE_KERNEL uint16_t narrow(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  const uint32_t rounded = (word + 0x7fffU + ((word >> 16) & 1U)) >> 16;
  return static_cast<uint16_t>((word & 0x7fffffffU) > 0x7f800000U ? 0x7fc0U : rounded);
}

/// How elements are stored, and the type that arithmetic is done in.
struct F32 {
  using Stored = float;
  using Value = float;
  static INLINE_KERNEL float load(float x) { return x; }
  static INLINE_KERNEL float store(float x) { return x; }
};
struct BF16 {
  using Stored = uint16_t;
  using Value = float;
  static INLINE_KERNEL float load(uint16_t x) { return widen(x); }
  static INLINE_KERNEL uint16_t store(float x) { return narrow(x); }
};
template <typename T>
struct Whole {
  using Stored = T;
  using Value = T;
  static INLINE_KERNEL T load(T x) { return x; }
  static INLINE_KERNEL T store(T x) { return x; }
};
using I32 = Whole<int32_t>;
using I64 = Whole<int64_t>;

/// e^x within 2 ulp, without branches: 2^n times a polynomial on [-ln2/2, ln2/2]. Overflows to inf,
/// underflows to 0.
INLINE_KERNEL float exponential(float x) {
  const float limited = x < -104.F ? -104.F : (x > 89.F ? 89.F : x);
  const float n = __builtin_rintf(limited * 1.44269504088896341F);
  float r = limited - n * 0.693359375F;
  r -= n * -2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.F;
  // Two factors, so that results near the ends of the range do not leave it early.
  const auto whole = static_cast<int32_t>(n);
  const int32_t half = whole >> 1;
  const uint32_t first = static_cast<uint32_t>(half + 127) << 23,
                 second = static_cast<uint32_t>(whole - half + 127) << 23;
  float a, b;
  std::memcpy(&a, &first, sizeof(a));
  std::memcpy(&b, &second, sizeof(b));
  const float result = p * a * b;
  return x == x ? result : x;
}

}  // namespace aclnn::kernels
