#include "runtime/kernels/rotary.h"

#include <cmath>
#include <cstring>
#include <string>

#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {

#define KERNEL_HAS_DOTS
#define KERNEL_SOURCE "runtime/kernels/rotary.inc"
#include "runtime/kernels/per_isa.h"

namespace {

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

}  // namespace

void rotary(const Rotary& arguments) {
  visit(arguments.type, [&](auto zero) { PER_ISA_OR_DOTS(rotary_rows<decltype(zero)>)(arguments); });
}

void cached_rotary(const CachedRotary& arguments) {
  visit(arguments.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kMaxRotaryWidth = 1024;
    if (arguments.rotary_width > kMaxRotaryWidth) throw std::out_of_range("rotary width above 1024");
    const auto rotate = PER_ISA_OR_DOTS(rotate_heads<T>);
    T mixed[kMaxRotaryWidth];
    for (int64_t token = 0; token < arguments.tokens; ++token)
      rotate(arguments, token, token_frequencies<T>(arguments, token, mixed));
  });
}

}  // namespace host_runtime::kernels
