// Copies between rows of tokens and a paged key or value cache.
#pragma once

#include <cstddef>
#include <cstdint>

namespace host_runtime::kernels {

/// A cache of `blocks` blocks of `block_size` rows. A row has `pieces` pieces of `piece_bytes`, piece_stride
/// apart: one piece in the plain layout, one every 32 bytes in FRACTAL_NZ.
struct PagedCache {
  char* memory = nullptr;
  int64_t blocks = 0;
  int64_t block_size = 0;
  int64_t block_stride = 0;  ///< bytes
  int64_t row_stride = 0;
  int64_t pieces = 1;
  int64_t piece_bytes = 0;
  int64_t piece_stride = 0;

  int64_t row_bytes() const { return pieces * piece_bytes; }
};

/// Copies row t of `rows` (row_stride bytes apart) to slot slots[t]; slots below 0 are skipped. Throws
/// std::out_of_range for a slot behind the cache.
struct CacheWrite {
  PagedCache cache;
  const char* rows = nullptr;
  int64_t row_stride = 0;
  const void* slots = nullptr;
  bool slots_are_64bit = false;
  int64_t tokens = 0;
};
void write_cache(const CacheWrite& arguments);

/// Copies keys [start, start + length) of request i, found through its row of the block table, to `rows`,
/// requests one behind the other. `lengths` are ends when `cumulative` (one more element, the first 0), else
/// lengths.
struct CacheRead {
  PagedCache cache;
  char* rows = nullptr;
  int64_t row_stride = 0;
  int64_t room = 0;  ///< rows that fit
  const int32_t* block_table = nullptr;
  int64_t table_stride = 0;
  int64_t table_width = 0;
  const int32_t* lengths = nullptr;
  const int32_t* starts = nullptr;  ///< nullptr: 0
  bool cumulative = false;
  int64_t requests = 0;
};
void read_cache(const CacheRead& arguments);

}  // namespace host_runtime::kernels
