// One tile of attention: up to kQueryTile rows (query tokens times the heads that share a key head) against
// all keys they may see, kKeyTile keys at a time.
#pragma once

#include <algorithm>
#include <limits>
#include <string>

#include "runtime/kernels/attention.h"
#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {

constexpr int64_t kTileAlign = 16;  // floats: rows of the scratch are whole vectors
constexpr int64_t kQueryTile = 64;
constexpr int64_t kKeyTile = 64;
/// Below this many rows keys are read where they lie; above, a tile of them is transposed first.
constexpr int64_t kDirectRows = 8;
/// Keys that are then taken at a time: at most this many, and of about as many bytes as the first level holds
/// beside their values.
constexpr int64_t kDirectKeys = 256;
constexpr int64_t kDirectBytes = 16 * 1024;
static_assert(kDirectRows * kDirectKeys <= kQueryTile * kKeyTile);
/// Keys behind which values are not read if the weight of each is zero.
constexpr int64_t kKeyGroup = 16;
/// The widest query row with its rope part.
constexpr int64_t kMaxKeyWidth = 1024 + 64;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

/// The scratch of one worker, in floats.
struct TileScratch {
  float* query;    ///< [kQueryTile][key_width]
  float* keys;     ///< [key_width][kKeyTile] transposed, or [kKeyTile][key_width]
  float* values;   ///< [kKeyTile][value_width]
  float* scores;   ///< [kQueryTile][kKeyTile]
  float* output;   ///< [kQueryTile][value_width]
  float* maximum;  ///< [kQueryTile]
  float* total;    ///< [kQueryTile]

  static int64_t key_width(const Attention& a) {
    return round_up(a.query.width + a.query_rope.width, kTileAlign);
  }
  static int64_t value_width(const Attention& a) { return round_up(a.value.width, kTileAlign); }
  static int64_t floats(const Attention& a) {
    return (kQueryTile + kKeyTile) * (key_width(a) + value_width(a)) + kQueryTile * (kKeyTile + 2);
  }
  TileScratch(const Attention& a, float* memory) {
    const auto take = [&memory](int64_t count) { return std::exchange(memory, memory + count); };
    query = take(kQueryTile * key_width(a));
    keys = take(kKeyTile * key_width(a));
    values = take(kKeyTile * value_width(a));
    scores = take(kQueryTile * kKeyTile);
    output = take(kQueryTile * value_width(a));
    maximum = take(kQueryTile);
    total = take(kQueryTile);
  }
};

struct KeyRange {
  int64_t begin, end;
};

KERNEL_INLINE KeyRange visible_keys(const Attention& a, const Sequence& sequence, int64_t token) {
  if (!a.band.limited) return {0, sequence.key_length};
  const int64_t centre = token + (a.band.aligned_to_end ? sequence.key_length - sequence.query_length : 0);
  const int64_t begin = std::max<int64_t>(0, centre - a.band.before);
  const int64_t end = std::min(sequence.key_length, centre + a.band.after + 1);
  return {std::min(begin, std::max<int64_t>(end, 0)), std::max<int64_t>(end, 0)};
}

}  // namespace host_runtime::kernels
