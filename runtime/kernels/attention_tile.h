// One tile of attention: up to kQueryTile rows (query tokens times the heads that share a key head) against
// all keys they may see, kKeyTile keys at a time.
#pragma once

#include <algorithm>
#include <limits>
#include <string>

#include "runtime/kernels/attention.h"
#include "runtime/kernels/simd.h"

namespace host_runtime::kernels {

constexpr int64_t kQueryTile = 64;
constexpr int64_t kKeyTile = 64;
/// Below this many rows keys are read where they lie; above, a tile of them is transposed first.
constexpr int64_t kDirectRows = 8;
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
    return round_up(a.query.width + a.query_rope.width, kLanes);
  }
  static int64_t value_width(const Attention& a) { return round_up(a.value.width, kLanes); }
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

/// Tokens [token, token + tokens) of a request, heads [head, head + heads), which all share key head
/// `key_head`. Row r of the tile is token r / heads and head r % heads.
struct Tile {
  const Sequence* sequence;
  int64_t token, tokens, head, heads, key_head;
  int64_t rows() const { return tokens * heads; }
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

template <typename T>
KERNEL_INLINE const T* row_of(const Attention& a, const HeadRows& rows, int64_t offset, const Tile& tile,
                              int64_t key) {
  const T* base = static_cast<const T*>(rows.base) + tile.key_head * rows.head_stride;
  if (a.block_table == nullptr) return base + offset + key * rows.row_stride;
  const int64_t block = a.block_table[tile.sequence->table_offset + key / a.block_size];
  if (block < 0 || block >= a.blocks)
    throw std::out_of_range("the block table names block " + std::to_string(block) + " for key " +
                            std::to_string(key) + ", but the cache has " + std::to_string(a.blocks) +
                            " blocks");
  return base + block * rows.block_stride + (key % a.block_size) * rows.row_stride;
}

/// Copies one row of `rows.width` elements as floats.
template <typename T>
KERNEL_INLINE void copy_row(const HeadRows& rows, const T* from, float* to) {
  for (int64_t start = 0; start < rows.width; start += rows.chunk, from += rows.chunk_stride)
    for (int64_t i = 0; i < rows.chunk; i += kLanes) {
      const int64_t count = lanes_at(i, rows.chunk);
      store_at(to + start, i, load_at(from, i, count), count);
    }
}

template <typename T>
KERNEL_INLINE void load_queries(const Attention& a, const Tile& tile, const TileScratch& scratch) {
  const int64_t stride = TileScratch::key_width(a);
  for (int64_t row = 0; row < tile.rows(); ++row) {
    const int64_t token = tile.token + row / tile.heads;
    const int64_t head = tile.head + row % tile.heads;
    float* to = scratch.query + row * stride;
    std::fill(to + (a.query.width + a.query_rope.width), to + stride, 0.0f);
    copy_row(a.query,
             static_cast<const T*>(a.query.base) + tile.sequence->query_offset + token * a.query.row_stride +
                 head * a.query.head_stride,
             to);
    if (a.query_rope.width > 0)
      copy_row(a.query_rope,
               static_cast<const T*>(a.query_rope.base) + tile.sequence->query_rope_offset +
                   token * a.query_rope.row_stride + head * a.query_rope.head_stride,
               to + a.query.width);
  }
}

/// c[m][n] (+)= a[m][k] * b[k][n] for `kRows` rows and `kColumns` vectors of columns.
template <int kRows, int kColumns>
KERNEL_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                  float* c, int64_t c_stride, int64_t depth, bool accumulate) {
  Lanes sums[kRows][kColumns];
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kColumns; ++n)
      sums[m][n] = accumulate ? load(c + m * c_stride + n * kLanes) : Lanes{};
  for (int64_t k = 0; k < depth; ++k) {
    Lanes column[kColumns];
    for (int n = 0; n < kColumns; ++n) column[n] = load(b + k * b_stride + n * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const Lanes factor = splat(a[m * a_stride + k]);
      for (int n = 0; n < kColumns; ++n) sums[m][n] += factor * column[n];
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kColumns; ++n) store(c + m * c_stride + n * kLanes, sums[m][n]);
}

template <int kColumns>
KERNEL_INLINE void multiply_columns(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                    float* c, int64_t c_stride, int64_t rows, int64_t depth,
                                    bool accumulate) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4)
    multiply_block<4, kColumns>(a + m * a_stride, a_stride, b, b_stride, c + m * c_stride, c_stride, depth,
                                accumulate);
  for (; m < rows; ++m)
    multiply_block<1, kColumns>(a + m * a_stride, a_stride, b, b_stride, c + m * c_stride, c_stride, depth,
                                accumulate);
}

/// `columns` is a multiple of kLanes.
KERNEL_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                            int64_t c_stride, int64_t rows, int64_t depth, int64_t columns, bool accumulate) {
  int64_t n = 0;
  for (; n + 4 * kLanes <= columns; n += 4 * kLanes)
    multiply_columns<4>(a, a_stride, b + n, b_stride, c + n, c_stride, rows, depth, accumulate);
  for (; n < columns; n += kLanes)
    multiply_columns<1>(a, a_stride, b + n, b_stride, c + n, c_stride, rows, depth, accumulate);
}

template <typename T>
KERNEL_INLINE float dot(const float* query, const T* key, int64_t width) {
  Lanes products{};
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t count = lanes_at(i, width);
    products += load_at(query, i, count) * load_at(key, i, count);
  }
  return sum(products);
}

/// Scores of a few rows: keys are read where they lie.
template <typename T>
KERNEL_INLINE void direct_scores(const Attention& a, const Tile& tile, const TileScratch& scratch,
                                 int64_t first, int64_t keys) {
  const int64_t stride = TileScratch::key_width(a);
  const int64_t rows = tile.rows();
  for (int64_t j = 0; j < keys; ++j) {
    const T* key = row_of<T>(a, a.key, tile.sequence->key_offset, tile, first + j);
    for (int64_t row = 0; row < rows; ++row)
      scratch.scores[row * kKeyTile + j] = dot(scratch.query + row * stride, key, a.key.width);
    if (a.key_rope.width > 0) {
      const T* rope = row_of<T>(a, a.key_rope, tile.sequence->key_rope_offset, tile, first + j);
      for (int64_t row = 0; row < rows; ++row)
        scratch.scores[row * kKeyTile + j] +=
            dot(scratch.query + row * stride + a.key.width, rope, a.key_rope.width);
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    std::fill(scratch.scores + row * kKeyTile + keys, scratch.scores + (row + 1) * kKeyTile, 0.0f);
}

/// Scores of many rows: a tile of keys is gathered, transposed (in blocks that stay in L1) and multiplied.
template <typename T>
KERNEL_INLINE void packed_scores(const Attention& a, const Tile& tile, const TileScratch& scratch,
                                 int64_t first, int64_t keys) {
  const int64_t width = a.key.width + a.key_rope.width;
  const int64_t stride = TileScratch::key_width(a);
  alignas(64) float gathered[kLanes][1024 + 64];
  for (int64_t block = 0; block < kKeyTile; block += kLanes) {
    const int64_t count = std::clamp<int64_t>(keys - block, 0, kLanes);
    for (int64_t j = 0; j < count; ++j) {
      copy_row(a.key, row_of<T>(a, a.key, tile.sequence->key_offset, tile, first + block + j), gathered[j]);
      if (a.key_rope.width > 0)
        copy_row(a.key_rope,
                 row_of<T>(a, a.key_rope, tile.sequence->key_rope_offset, tile, first + block + j),
                 gathered[j] + a.key.width);
    }
    for (int64_t d = 0; d < width; ++d) {
      float* to = scratch.keys + d * kKeyTile + block;
      for (int64_t j = 0; j < kLanes; ++j) to[j] = j < count ? gathered[j][d] : 0.0f;
    }
  }
  multiply(scratch.query, stride, scratch.keys, kKeyTile, scratch.scores, kKeyTile, tile.rows(), width,
           kKeyTile, false);
}

/// Scales the scores of one row, adds the bias and hides what the row may not see.
template <typename T>
KERNEL_INLINE void finish_scores(const Attention& a, const Tile& tile, float* scores, int64_t row,
                                 int64_t first, int64_t keys) {
  const int64_t token = tile.token + row / tile.heads;
  const int64_t head = tile.head + row % tile.heads;
  for (int64_t j = 0; j < kKeyTile; j += kLanes) store(scores + j, load(scores + j) * a.scale);
  if (a.bias != nullptr) {
    const T* bias = static_cast<const T*>(a.bias) + tile.sequence->bias_offset + token * a.bias_row_stride +
                    head * a.bias_head_stride + first;
    for (int64_t j = 0; j < keys; j += kLanes) {
      const int64_t count = lanes_at(j, keys);
      store_at(scores, j, load(scores + j) + load_at(bias, j, count), count);
    }
  }
  const KeyRange seen = visible_keys(a, *tile.sequence, token);
  const int64_t begin = std::clamp<int64_t>(seen.begin - first, 0, kKeyTile);
  const int64_t end = std::clamp<int64_t>(std::min(seen.end - first, keys), 0, kKeyTile);
  std::fill(scores, scores + begin, kNothing);
  std::fill(scores + std::max(begin, end), scores + kKeyTile, kNothing);
  if (a.mask != nullptr) {
    const uint8_t* mask =
        a.mask + tile.sequence->mask_offset + token * a.mask_row_stride + head * a.mask_head_stride + first;
    for (int64_t j = begin; j < end; ++j)
      if (mask[j] != 0) scores[j] = kNothing;
  }
}

/// Turns scores into weights against the running maximum, and rescales what was accumulated so far.
template <typename T>
KERNEL_INLINE void update_softmax(const Attention& a, const Tile& tile, const TileScratch& scratch,
                                  int64_t first, int64_t keys) {
  const int64_t value_width = TileScratch::value_width(a);
  for (int64_t row = 0; row < tile.rows(); ++row) {
    float* scores = scratch.scores + row * kKeyTile;
    finish_scores<T>(a, tile, scores, row, first, keys);
    Lanes best = splat(kNothing);
    for (int64_t j = 0; j < kKeyTile; j += kLanes) best = maximum(best, load(scores + j));
    const float previous = scratch.maximum[row];
    const float now = std::max(previous, largest(best));
    if (now == kNothing) {
      std::fill(scores, scores + kKeyTile, 0.0f);
      continue;
    }
    Lanes weights{};
    for (int64_t j = 0; j < kKeyTile; j += kLanes) {
      const Lanes weight = exponential(load(scores + j) - now);
      store(scores + j, weight);
      weights += weight;
    }
    scratch.maximum[row] = now;
    if (now == previous || previous == kNothing) {
      scratch.total[row] += sum(weights);
      continue;
    }
    const float shrink = std::exp(previous - now);
    scratch.total[row] = scratch.total[row] * shrink + sum(weights);
    float* output = scratch.output + row * value_width;
    for (int64_t i = 0; i < value_width; i += kLanes) store(output + i, load(output + i) * shrink);
  }
}

template <typename T>
KERNEL_INLINE void accumulate_values(const Attention& a, const Tile& tile, const TileScratch& scratch,
                                     int64_t first, int64_t keys) {
  const int64_t stride = TileScratch::value_width(a);
  for (int64_t j = 0; j < keys; ++j) {
    float* to = scratch.values + j * stride;
    if (a.value.width < stride) std::fill(to + a.value.width, to + stride, 0.0f);
    copy_row(a.value, row_of<T>(a, a.value, tile.sequence->value_offset, tile, first + j), to);
  }
  multiply(scratch.scores, kKeyTile, scratch.values, stride, scratch.output, stride, tile.rows(), keys,
           stride, true);
}

template <typename T>
KERNEL_INLINE void store_rows(const Attention& a, const Tile& tile, const TileScratch& scratch) {
  const int64_t stride = TileScratch::value_width(a);
  for (int64_t row = 0; row < tile.rows(); ++row) {
    const int64_t token = tile.token + row / tile.heads;
    const int64_t head = tile.head + row % tile.heads;
    const float total = scratch.total[row];
    const bool empty = scratch.maximum[row] == kNothing;
    const float inverse = empty ? 0.0f : 1.0f / total;
    T* to = static_cast<T*>(a.output) + tile.sequence->output_offset + token * a.output_row_stride +
            head * a.output_head_stride;
    const float* from = scratch.output + row * stride;
    for (int64_t i = 0; i < a.value.width; i += kLanes) {
      const int64_t count = lanes_at(i, a.value.width);
      store_at(to, i, load(from + i) * inverse, count);
    }
    const int64_t lse = tile.sequence->lse_offset + token * a.lse_row_stride + head * a.lse_head_stride;
    if (a.lse != nullptr) a.lse[lse] = empty ? a.row_empty_lse : scratch.maximum[row] + std::log(total);
    if (a.row_max != nullptr) std::fill_n(a.row_max + lse * 8, 8, empty ? 0.0f : scratch.maximum[row]);
    if (a.row_sum != nullptr) std::fill_n(a.row_sum + lse * 8, 8, empty ? 0.0f : total);
  }
}

template <typename T>
KERNEL_CLONES void attend(const Attention& a, const Tile& tile, float* memory) {
  const TileScratch scratch(a, memory);
  load_queries<T>(a, tile, scratch);
  for (int64_t row = 0; row < tile.rows(); ++row) {
    const float start = a.sink == nullptr ? kNothing : a.sink[tile.head + row % tile.heads];
    scratch.maximum[row] = start;
    scratch.total[row] = start == kNothing ? 0.0f : 1.0f;
  }
  std::fill_n(scratch.output, tile.rows() * TileScratch::value_width(a), 0.0f);
  const KeyRange first_row = visible_keys(a, *tile.sequence, tile.token);
  const KeyRange last_row = visible_keys(a, *tile.sequence, tile.token + tile.tokens - 1);
  const bool direct = tile.rows() <= kDirectRows && a.key.chunk == a.key.width;
  for (int64_t key = first_row.begin / kKeyTile * kKeyTile; key < last_row.end; key += kKeyTile) {
    const int64_t keys = std::min(kKeyTile, last_row.end - key);
    if (direct) {
      direct_scores<T>(a, tile, scratch, key, keys);
    } else {
      packed_scores<T>(a, tile, scratch, key, keys);
    }
    update_softmax<T>(a, tile, scratch, key, keys);
    accumulate_values<T>(a, tile, scratch, key, keys);
  }
  store_rows<T>(a, tile, scratch);
}

}  // namespace host_runtime::kernels
