// Scaled dot-product attention over padded, packed (TND) and paged keys: one pass with a running softmax,
// float accumulation for every element type.
#pragma once

#include <cstddef>
#include <vector>

#include "runtime/kernels/dtype.h"

namespace host_runtime::kernels {

/// Where row (token) s of head n lies: base + s * row_stride + n * head_stride, in elements. A row is `width`
/// elements, contiguous when chunk == width; FRACTAL_NZ keeps it in chunks of 32 bytes (`chunk` elements),
/// chunk_stride apart.
struct HeadRows {
  const void* base = nullptr;
  int64_t width = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int64_t block_stride = 0;  ///< paged keys and values: between blocks
  int64_t chunk = 0;
  int64_t chunk_stride = 0;
};

/// One request: where its tokens start (elements from the bases) and how many there are.
struct Sequence {
  int64_t query_offset = 0;
  int64_t query_rope_offset = 0;
  int64_t key_offset = 0;
  int64_t value_offset = 0;
  int64_t key_rope_offset = 0;
  int64_t output_offset = 0;
  int64_t lse_offset = 0;
  int64_t mask_offset = 0;
  int64_t bias_offset = 0;
  int64_t table_offset = 0;
  int64_t query_length = 0;
  int64_t key_length = 0;
};

/// Which keys row i of a request of Sq queries and Sk keys may see, before an explicit mask:
/// keys j with  i + shift - before <= j <= i + shift + after,  shift = Sk - Sq when aligned to the end, else
/// 0.
struct Band {
  bool limited = false;
  bool aligned_to_end = false;
  int64_t before = 0;
  int64_t after = 0;
};

/// Work for one thread: tokens [token, token + tokens) of a request, heads [head, head + heads), which all
/// share key head `key_head`. Row r of the tile is token r / heads and head r % heads.
struct Tile {
  int64_t sequence, token, tokens, head, heads, key_head;
  int64_t rows() const { return tokens * heads; }
};

struct Attention {
  Type type;  ///< of query, key, value, ropes, output and bias
  HeadRows query, query_rope, key, key_rope, value;
  void* output = nullptr;
  int64_t output_row_stride = 0, output_head_stride = 0;
  float* lse = nullptr;  ///< nullptr: not wanted
  int64_t lse_row_stride = 0, lse_head_stride = 0;
  float* row_max =
      nullptr;  ///< FlashAttentionScore's softmax max and sum, 8 copies a row, strides of lse times 8
  float* row_sum = nullptr;
  const uint8_t* mask = nullptr;  ///< nonzero: not seen
  int64_t mask_row_stride = 0, mask_head_stride = 0;
  const void* bias = nullptr;  ///< its product with bias_scale is added to the scaled scores
  float bias_scale = 1.0f;
  int64_t bias_row_stride = 0, bias_head_stride = 0;
  const float* sink = nullptr;  ///< one a head: joins the denominator
  const int32_t* block_table = nullptr;
  int64_t block_size = 0, blocks = 0;
  int64_t heads = 0, key_heads = 0;
  float scale = 1.0f;
  float row_empty_lse = 0.0f;  ///< lse of a row that sees no key
  Band band;
  const uint8_t* causal_probe = nullptr;  ///< a 2048 x 2048 compressed mask, checked to be an upper triangle
  std::vector<Sequence> sequences;
  std::vector<Tile> tiles;  ///< written by plan()
  int64_t work = 0;         ///< multiply-adds, written by plan()
  int64_t threads = 1;      ///< torch's number of them at plan(): how many the scratch is for

  /// Cuts the work into tiles: once for any number of runs.
  void plan();
};

/// Bytes of scratch that `attention` needs: it depends on the widths and on `threads` only, not on lengths.
size_t attention_scratch(const Attention& arguments);

/// Throws std::out_of_range for a block id outside the cache, std::invalid_argument for a compressed mask
/// that is not an upper triangle of ones.
void attention(const Attention& arguments, void* scratch);

}  // namespace host_runtime::kernels
