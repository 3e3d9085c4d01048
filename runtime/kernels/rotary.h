// Rotary position embedding: y = x * cos + rotate(x) * sin, computed in float and rounded once.
#pragma once

#include "runtime/kernels/dtype.h"
#include "runtime/kernels/rows.h"

namespace host_runtime::kernels {

/// How rotate(x) pairs the elements of a row of d:
///   kHalf            (-x[d/2:], x[:d/2])
///   kInterleave      (-x[1], x[0], -x[3], x[2], ...)
///   kQuarter         each half of the row rotated as kHalf
///   kInterleaveHalf  x gathered as (even, odd) elements, then as kHalf
enum class RotaryMode : uint8_t { kHalf, kInterleave, kQuarter, kInterleaveHalf };

/// `rows` rows of `width` contiguous elements. Rows with stride 0 repeat (cos and sin broadcast over heads).
/// y may be x for every mode but kInterleaveHalf.
struct Rotary {
  Type type;  ///< of x, y, cos and sin
  RotaryMode mode;
  const void* x;
  const void* cos;
  const void* sin;
  void* y;
  Rows x_rows, cos_rows, sin_rows, y_rows;
  int64_t rows;
  int64_t width;
};

void rotary(const Rotary& arguments);

/// Rotation of the first `rotary_width` elements of every head by the cache's row for the token's position;
/// the rest is copied. A cache row is cos (rotary_width / 2 elements) and then sin.
struct CachedRotary {
  Type type;
  bool half;              ///< kHalf pairing, else kInterleave
  const void* positions;  ///< sections rows of `tokens` positions
  bool positions_are_64bit;
  const void* cache;
  int64_t cache_rows;  ///< positions outside [0, cache_rows) are an error
  int64_t cache_row_stride;
  const void* x;
  void* y;
  int64_t tokens, heads, head_width, rotary_width;
  int64_t x_token_stride, y_token_stride;  ///< heads of a token are contiguous
  int64_t sections;                        ///< 1, or the number of rows of positions (multimodal)
  int64_t section_sizes[4];   ///< how many of the rotary_width / 2 frequencies each row of positions drives
  bool sections_interleaved;  ///< frequency i of sections 1.. belongs to section i % sections while it lasts
};

/// Throws std::out_of_range naming the token and the position when a position lies outside the cache.
void cached_rotary(const CachedRotary& arguments);

}  // namespace host_runtime::kernels
