#include "runtime/kernels/rotary.h"

#include <string>

#include "runtime/kernels/simd.h"

namespace host_runtime::kernels {
namespace {

template <typename T>
KERNEL_INLINE void rotate_half(const T* x, const T* cos, const T* sin, T* y, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = lanes_at(i, half);
    const Lanes low = load_at(x, i, count);
    const Lanes high = load_at(x, half + i, count);
    store_at(y, i, low * load_at(cos, i, count) - high * load_at(sin, i, count), count);
    store_at(y, half + i, high * load_at(cos, half + i, count) + low * load_at(sin, half + i, count), count);
  }
}

template <typename T>
KERNEL_INLINE float scalar(const T* from) {
  return load_some(from, 1)[0];
}
template <typename T>
KERNEL_INLINE void put(T* to, float value) {
  store_some(to, splat(value), 1);
}
template <>
KERNEL_INLINE float scalar(const float* from) {
  return *from;
}
template <>
KERNEL_INLINE void put(float* to, float value) {
  *to = value;
}

template <typename T>
KERNEL_INLINE void rotate_interleave(const T* x, const T* cos, const T* sin, T* y, int64_t width) {
  for (int64_t i = 0; i < width; i += 2) {
    const float even = scalar(x + i);
    const float odd = scalar(x + i + 1);
    put(y + i, even * scalar(cos + i) - odd * scalar(sin + i));
    put(y + i + 1, odd * scalar(cos + i + 1) + even * scalar(sin + i + 1));
  }
}

template <typename T>
KERNEL_INLINE void rotate_gathered(const T* x, const T* cos, const T* sin, T* y, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float even = scalar(x + 2 * i);
    const float odd = scalar(x + 2 * i + 1);
    put(y + i, even * scalar(cos + i) - odd * scalar(sin + i));
    put(y + half + i, odd * scalar(cos + half + i) + even * scalar(sin + half + i));
  }
}

template <typename T>
KERNEL_CLONES void rotary_rows(const Rotary& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + a.x_rows.offset(row);
    const T* cos = static_cast<const T*>(a.cos) + a.cos_rows.offset(row);
    const T* sin = static_cast<const T*>(a.sin) + a.sin_rows.offset(row);
    T* y = static_cast<T*>(a.y) + a.y_rows.offset(row);
    const int64_t half = a.width / 2;
    switch (a.mode) {
      case RotaryMode::kHalf:
        rotate_half(x, cos, sin, y, a.width);
        break;
      case RotaryMode::kInterleave:
        rotate_interleave(x, cos, sin, y, a.width);
        break;
      case RotaryMode::kQuarter:
        rotate_half(x, cos, sin, y, half);
        rotate_half(x + half, cos + half, sin + half, y + half, half);
        break;
      case RotaryMode::kInterleaveHalf:
        rotate_gathered(x, cos, sin, y, a.width);
        break;
    }
  }
}

/// The section (row of positions) that drives frequency `index`.
int64_t section_of(const CachedRotary& a, int64_t index) {
  if (a.sections_interleaved) {
    const int64_t candidate = index % a.sections;
    return candidate != 0 && index < a.section_sizes[candidate] * a.sections ? candidate : 0;
  }
  int64_t section = 0;
  for (int64_t end = a.section_sizes[0]; section + 1 < a.sections && index >= end;
       end += a.section_sizes[section])
    ++section;
  return section;
}

int64_t position_of(const CachedRotary& a, int64_t section, int64_t token) {
  const int64_t index = section * a.tokens + token;
  const int64_t position = a.positions_are_64bit ? static_cast<const int64_t*>(a.positions)[index]
                                                 : static_cast<const int32_t*>(a.positions)[index];
  if (position < 0 || position >= a.cache_rows)
    throw std::out_of_range("position " + std::to_string(position) + " of token " + std::to_string(token) +
                            " is outside the cos/sin cache of " + std::to_string(a.cache_rows) + " rows");
  return position;
}

template <typename T>
const T* token_frequencies(const CachedRotary& a, int64_t token, T* mixed) {
  const T* cache = static_cast<const T*>(a.cache);
  if (a.sections <= 1) return cache + position_of(a, 0, token) * a.cache_row_stride;
  const int64_t half = a.rotary_width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const T* row = cache + position_of(a, section_of(a, i), token) * a.cache_row_stride;
    mixed[i] = row[i];
    mixed[half + i] = row[half + i];
  }
  return mixed;
}

template <typename T>
KERNEL_CLONES void rotate_heads(const CachedRotary& a, int64_t token, const T* frequencies) {
  const int64_t half = a.rotary_width / 2;
  const T* cos = frequencies;
  const T* sin = frequencies + half;
  for (int64_t head = 0; head < a.heads; ++head) {
    const T* x = static_cast<const T*>(a.x) + token * a.x_token_stride + head * a.head_width;
    T* y = static_cast<T*>(a.y) + token * a.y_token_stride + head * a.head_width;
    if (a.half) {
      for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t count = lanes_at(i, half);
        const Lanes low = load_at(x, i, count);
        const Lanes high = load_at(x, half + i, count);
        const Lanes c = load_at(cos, i, count);
        const Lanes s = load_at(sin, i, count);
        store_at(y, i, low * c - high * s, count);
        store_at(y, half + i, high * c + low * s, count);
      }
    } else {
      for (int64_t i = 0; i < half; ++i) {
        const float even = scalar(x + 2 * i);
        const float odd = scalar(x + 2 * i + 1);
        put(y + 2 * i, even * scalar(cos + i) - odd * scalar(sin + i));
        put(y + 2 * i + 1, odd * scalar(cos + i) + even * scalar(sin + i));
      }
    }
    if (x != y && a.rotary_width < a.head_width)
      std::memcpy(y + a.rotary_width, x + a.rotary_width,
                  static_cast<size_t>(a.head_width - a.rotary_width) * sizeof(T));
  }
}

}  // namespace

void rotary(const Rotary& arguments) {
  visit(arguments.type, [&](auto zero) { rotary_rows<decltype(zero)>(arguments); });
}

void cached_rotary(const CachedRotary& arguments) {
  visit(arguments.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kMaxRotaryWidth = 1024;
    if (arguments.rotary_width > kMaxRotaryWidth) throw std::out_of_range("rotary width above 1024");
    T mixed[kMaxRotaryWidth];
    for (int64_t token = 0; token < arguments.tokens; ++token)
      rotate_heads<T>(arguments, token, token_frequencies<T>(arguments, token, mixed));
  });
}

}  // namespace host_runtime::kernels
