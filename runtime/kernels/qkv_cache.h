// A packed QKV projection to what attention reads: queries and keys normalised and rotated, keys and values
// in their paged caches.
#pragma once

#include "runtime/kernels/dtype.h"
#include "runtime/kernels/kv_cache.h"

namespace host_runtime::kernels {

/// Where the rows of keys or values go. A row is `heads * width` elements.
struct QkvCacheOutput {
  PagedCache cache;               ///< FRACTAL_NZ: pieces of 32 bytes
  const float* scale = nullptr;   ///< [heads, width]: the cache is int8, round(row / scale + offset)
  const float* offset = nullptr;  ///< [heads, width], nullptr: 0
  void* rows = nullptr;  ///< the rows as they are before quantisation, contiguous; nullptr: not wanted
};

struct QkvCache {
  Type type;  ///< of qkv, gammas, cos, sin, query_out and caches that are not quantised
  const void* qkv;
  int64_t qkv_row_stride;  ///< elements; a row is (query_heads + 2 * key_heads) * width
  const void* query_gamma;
  const void* key_gamma;
  const void* cos;  ///< rows of `width` elements
  const void* sin;
  int64_t cos_row_stride, sin_row_stride;
  const int64_t* slots;  ///< -1: the token is not written to the caches
  void* query_out;       ///< contiguous
  void* query_rows;      ///< a second copy of it; nullptr: not wanted
  QkvCacheOutput key, value;
  int64_t tokens, query_heads, key_heads;
  int64_t width;  ///< a multiple of 32, at most kMaxQkvWidth
  float epsilon;
};
constexpr int64_t kMaxQkvWidth = 256;

/// Throws std::out_of_range for a slot below -1 or behind a cache, before anything is written.
void qkv_cache(const QkvCache& arguments);

}  // namespace host_runtime::kernels
