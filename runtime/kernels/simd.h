// Sixteen float lanes, written with GCC's vector extension so that one source serves AVX-512, AVX2, SSE2 and
// NEON. Functions marked KERNEL_CLONES are compiled once per instruction set and chosen when the library is
// loaded; the helpers below are always inlined into them, so each clone gets its own instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime/kernels/dtype.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define KERNEL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KERNEL_CLONES
#endif
#define KERNEL_INLINE inline __attribute__((always_inline))

namespace host_runtime::kernels {

constexpr int64_t kLanes = 16;
using Lanes = float __attribute__((vector_size(64)));
using IntLanes = int32_t __attribute__((vector_size(64)));
using WordLanes = uint32_t __attribute__((vector_size(64)));
using HalfWordLanes = uint16_t __attribute__((vector_size(32)));
using ByteLanes = int8_t __attribute__((vector_size(16)));

KERNEL_INLINE Lanes splat(float value) { return value - Lanes{}; }

template <typename To, typename From>
KERNEL_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

/// IEEE half -> float on the lanes' low 16 bits, exact for normal, subnormal, infinite and NaN values.
KERNEL_INLINE Lanes half_bits_to_float(WordLanes half) {
  const WordLanes sign = (half & 0x8000u) << 16;
  const WordLanes scaled = bits_as<WordLanes>(bits_as<Lanes>((half & 0x7fffu) << 13) * splat(0x1p112f));
  const WordLanes special = bits_as<WordLanes>((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bits_as<Lanes>(sign | scaled | special);
}

/// float -> IEEE half, to nearest even, overflowing to infinity.
KERNEL_INLINE WordLanes float_to_half_bits(Lanes value) {
  const WordLanes bits = bits_as<WordLanes>(value);
  const WordLanes sign = (bits >> 16) & 0x8000u;
  const WordLanes magnitude = bits & 0x7fffffffu;
  const WordLanes normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const WordLanes tiny = bits_as<WordLanes>(bits_as<Lanes>(magnitude) + splat(0.5f)) - 0x3f000000u;
  const WordLanes is_tiny = bits_as<WordLanes>(magnitude < 0x38800000u);
  const WordLanes is_large = bits_as<WordLanes>(magnitude >= 0x477ff000u);
  const WordLanes is_nan = bits_as<WordLanes>(magnitude > 0x7f800000u);
  WordLanes half = (tiny & is_tiny) | (normal & ~is_tiny);
  half = (half & ~is_large) | (0x7c00u & is_large);
  return sign | half | (0x200u & is_nan);
}

KERNEL_INLINE WordLanes float_to_bfloat_bits(Lanes value) {
  const WordLanes bits = bits_as<WordLanes>(value);
  const WordLanes is_nan = bits_as<WordLanes>((bits & 0x7fffffffu) > 0x7f800000u);
  const WordLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (rounded & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan);
}

KERNEL_INLINE Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
KERNEL_INLINE WordLanes load_words(const void* from) {
  HalfWordLanes raw;
  std::memcpy(&raw, from, sizeof(raw));
  return __builtin_convertvector(raw, WordLanes);
}
KERNEL_INLINE Lanes load(const Half* from) { return half_bits_to_float(load_words(from)); }
KERNEL_INLINE Lanes load(const BFloat* from) { return bits_as<Lanes>(load_words(from) << 16); }
KERNEL_INLINE Lanes load(const int8_t* from) {
  ByteLanes raw;
  std::memcpy(&raw, from, sizeof(raw));
  return __builtin_convertvector(raw, Lanes);
}
KERNEL_INLINE Lanes load(const int32_t* from) {
  IntLanes raw;
  std::memcpy(&raw, from, sizeof(raw));
  return __builtin_convertvector(raw, Lanes);
}

KERNEL_INLINE void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof(lanes)); }
KERNEL_INLINE void store_words(void* to, WordLanes words) {
  const HalfWordLanes raw = __builtin_convertvector(words, HalfWordLanes);
  std::memcpy(to, &raw, sizeof(raw));
}
KERNEL_INLINE void store(Half* to, Lanes lanes) { store_words(to, float_to_half_bits(lanes)); }
KERNEL_INLINE void store(BFloat* to, Lanes lanes) { store_words(to, float_to_bfloat_bits(lanes)); }

/// The first `count` (1..16) lanes; the others read as zero.
template <typename T>
KERNEL_INLINE Lanes load_some(const T* from, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}
template <typename T>
KERNEL_INLINE void store_some(T* to, Lanes lanes, int64_t count) {
  T padded[kLanes];
  store(padded, lanes);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

/// How many of the lanes at `offset` lie within `size`. Loops read `for (i = 0; i < size; i += kLanes)` with
/// load_at/store_at; a lambda in their place would not be compiled for the clone's instruction set.
KERNEL_INLINE int64_t lanes_at(int64_t offset, int64_t size) {
  return size - offset < kLanes ? size - offset : kLanes;
}
template <typename T>
KERNEL_INLINE Lanes load_at(const T* from, int64_t offset, int64_t count) {
  return count == kLanes ? load(from + offset) : load_some(from + offset, count);
}
template <typename T>
KERNEL_INLINE void store_at(T* to, int64_t offset, Lanes lanes, int64_t count) {
  if (count == kLanes) {
    store(to + offset, lanes);
  } else {
    store_some(to + offset, lanes, count);
  }
}

/// Rounds every lane to what type T can hold; the identity for float.
template <typename T>
KERNEL_INLINE Lanes round_to(Lanes lanes) {
  T kept[kLanes];
  store(kept, lanes);
  return load(kept);
}
template <>
KERNEL_INLINE Lanes round_to<float>(Lanes lanes) {
  return lanes;
}

KERNEL_INLINE Lanes select(IntLanes condition, Lanes yes, Lanes no) {
  return bits_as<Lanes>((condition & bits_as<IntLanes>(yes)) | (~condition & bits_as<IntLanes>(no)));
}
KERNEL_INLINE Lanes maximum(Lanes a, Lanes b) { return select(a > b, a, b); }
KERNEL_INLINE Lanes minimum(Lanes a, Lanes b) { return select(a < b, a, b); }
KERNEL_INLINE Lanes absolute(Lanes a) { return bits_as<Lanes>(bits_as<WordLanes>(a) & 0x7fffffffu); }

/// Nearest integer, ties to even, for |a| < 2^22.
KERNEL_INLINE Lanes nearest(Lanes a) {
  const Lanes magic = splat(0x1.8p23f);
  return (a + magic) - magic;
}

KERNEL_INLINE float sum(Lanes lanes) {
  float values[kLanes];
  store(values, lanes);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}
KERNEL_INLINE float largest(Lanes lanes) {
  float values[kLanes];
  store(values, lanes);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i)
      values[i] = values[i] > values[i + width] ? values[i] : values[i + width];
  return values[0];
}

/// e^a within 2 ulp; 0 below -87.3 (and for -inf), +inf above 88.7, NaN stays NaN. Cody-Waite reduction by ln
/// 2 and a degree-6 polynomial on [-ln2/2, ln2/2].
KERNEL_INLINE Lanes exponential(Lanes a) {
  const Lanes low = splat(-87.33654f);
  const Lanes high = splat(88.72283f);
  const Lanes clamped = minimum(maximum(a, low), high);
  const Lanes whole = nearest(clamped * splat(1.44269504f));
  Lanes rest = clamped - whole * splat(0.693359375f);
  rest = rest + whole * splat(2.12194440e-4f);
  Lanes series = splat(1.9875691500e-4f);
  series = series * rest + splat(1.3981999507e-3f);
  series = series * rest + splat(8.3334519073e-3f);
  series = series * rest + splat(4.1665795894e-2f);
  series = series * rest + splat(1.6666665459e-1f);
  series = series * rest + splat(5.0000001201e-1f);
  series = series * rest * rest + rest + splat(1.0f);
  // Two half-steps, because 2^128 is not a float.
  const IntLanes exponent = __builtin_convertvector(whole, IntLanes);
  const IntLanes first = exponent >> 1;
  const Lanes scaled =
      series * bits_as<Lanes>((first + 127) << 23) * bits_as<Lanes>((exponent - first + 127) << 23);
  const Lanes bounded = select(a < low, splat(0.0f), select(a > high, splat(INFINITY), scaled));
  return select(a != a, a, bounded);
}

KERNEL_INLINE Lanes sigmoid(Lanes a) { return splat(1.0f) / (splat(1.0f) + exponential(-a)); }

}  // namespace host_runtime::kernels
