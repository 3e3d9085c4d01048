#include "runtime/hccl/reduction.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace host_runtime::hccl {
namespace {

constexpr size_t kBlock = 512;

// Signed overflow wraps as on the device; unsigned arithmetic says so without undefined behaviour. 16-bit
// products are formed in 32 bits: the implicit promotion would be to (signed) int.
template <class T>
using Wrapping = std::conditional_t<(sizeof(T) < 4), uint32_t, std::make_unsigned_t<T>>;

struct Sum {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
    } else {
      return a + b;
    }
  }
};
struct Prod {
  template <class T>
  static T apply(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
    } else {
      return a * b;
    }
  }
};
struct Max {
  template <class T>
  static T apply(T a, T b) {
    return a < b ? b : a;
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b) {
    return b < a ? b : a;
  }
};

template <class T, class Wide>
void widen(const T* in, Wide* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = static_cast<Wide>(in[i]);
}

template <class T, class Wide>
void narrow(const Wide* in, T* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = static_cast<T>(in[i]);
}

#if defined(__x86_64__)
// c10::Half converts by integer arithmetic, one at a time; the processor has an instruction for eight.
__attribute__((target("avx,f16c"))) size_t widen_by_eight(const c10::Half* in, float* out, size_t count) {
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  return i;
}

__attribute__((target("avx,f16c"))) size_t narrow_by_eight(const float* in, c10::Half* out, size_t count) {
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
  return i;
}

bool has_f16c() {
  static const bool supported = __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avx");
  return supported;
}

template <>
void widen<c10::Half, float>(const c10::Half* in, float* out, size_t count) {
  const size_t done = has_f16c() ? widen_by_eight(in, out, count) : 0;
  for (size_t i = done; i < count; ++i) out[i] = static_cast<float>(in[i]);
}

template <>
void narrow<c10::Half, float>(const float* in, c10::Half* out, size_t count) {
  const size_t done = has_f16c() ? narrow_by_eight(in, out, count) : 0;
  for (size_t i = done; i < count; ++i) out[i] = static_cast<c10::Half>(in[i]);
}
#endif

// The sources are read block by block into `total` (Wide) before anything is written, so `out` may be a
// source.
template <class T, class Wide, class Op>
void reduce_typed(const std::vector<const void*>& sources, void* out, size_t count) {
  Wide total[kBlock];
  Wide next[kBlock];
  auto* target = static_cast<T*>(out);
  for (size_t start = 0; start < count; start += kBlock) {
    const size_t size = std::min(kBlock, count - start);
    widen(static_cast<const T*>(sources[0]) + start, total, size);
    for (size_t rank = 1; rank < sources.size(); ++rank) {
      widen(static_cast<const T*>(sources[rank]) + start, next, size);
      for (size_t i = 0; i < size; ++i) total[i] = Op::apply(total[i], next[i]);
    }
    narrow(total, target + start, size);
  }
}

template <class Op>
void reduce_with(HcclDataType type, const std::vector<const void*>& sources, void* out, size_t count) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return reduce_typed<int8_t, int8_t, Op>(sources, out, count);
    case HCCL_DATA_TYPE_INT16:
      return reduce_typed<int16_t, int16_t, Op>(sources, out, count);
    case HCCL_DATA_TYPE_INT32:
      return reduce_typed<int32_t, int32_t, Op>(sources, out, count);
    case HCCL_DATA_TYPE_INT64:
      return reduce_typed<int64_t, int64_t, Op>(sources, out, count);
    case HCCL_DATA_TYPE_FP16:
      return reduce_typed<c10::Half, float, Op>(sources, out, count);
    case HCCL_DATA_TYPE_BFP16:
      return reduce_typed<c10::BFloat16, float, Op>(sources, out, count);
    default:  // require_reducible() let nothing else through
      return reduce_typed<float, float, Op>(sources, out, count);
  }
}

}  // namespace

void reduce(HcclDataType type, HcclReduceOp op, const std::vector<const void*>& sources, void* out,
            size_t count) {
  switch (op) {
    case HCCL_REDUCE_PROD:
      return reduce_with<Prod>(type, sources, out, count);
    case HCCL_REDUCE_MAX:
      return reduce_with<Max>(type, sources, out, count);
    case HCCL_REDUCE_MIN:
      return reduce_with<Min>(type, sources, out, count);
    default:
      return reduce_with<Sum>(type, sources, out, count);
  }
}

}  // namespace host_runtime::hccl
