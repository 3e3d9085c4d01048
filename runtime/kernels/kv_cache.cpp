#include "runtime/kernels/kv_cache.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace host_runtime::kernels {
namespace {

char* cache_row(const PagedCache& cache, int64_t block, int64_t row) {
  return cache.memory + block * cache.block_stride + row * cache.row_stride;
}

}  // namespace

void write_cache(const CacheWrite& a) {
  const int64_t slots = a.cache.blocks * a.cache.block_size;
  for (int64_t token = 0; token < a.tokens; ++token) {
    const int64_t slot = a.slots_are_64bit ? static_cast<const int64_t*>(a.slots)[token]
                                           : static_cast<const int32_t*>(a.slots)[token];
    if (slot < 0) continue;
    if (slot >= slots)
      throw std::out_of_range("slot_mapping has " + std::to_string(slot) + " for token " +
                              std::to_string(token) + ", but the cache has " + std::to_string(slots) +
                              " slots");
    char* to = cache_row(a.cache, slot / a.cache.block_size, slot % a.cache.block_size);
    const char* from = a.rows + token * a.row_stride;
    for (int64_t i = 0; i < a.cache.pieces; ++i)
      std::memcpy(to + i * a.cache.piece_stride, from + i * a.cache.piece_bytes,
                  static_cast<size_t>(a.cache.piece_bytes));
  }
}

void read_cache(const CacheRead& a) {
  int64_t written = 0;
  for (int64_t request = 0; request < a.requests; ++request) {
    const int64_t length =
        a.cumulative ? a.lengths[request + 1] - a.lengths[request] : static_cast<int64_t>(a.lengths[request]);
    const int64_t start = a.starts == nullptr ? 0 : a.starts[request];
    if (written + length > a.room ||
        (start + length + a.cache.block_size - 1) / a.cache.block_size > a.table_width)
      throw std::out_of_range("request " + std::to_string(request) + " has " + std::to_string(length) +
                              " keys, more than the output or its row of the block table holds");
    for (int64_t key = start; key < start + length; ++key, ++written) {
      const int64_t block = a.block_table[request * a.table_stride + key / a.cache.block_size];
      if (block < 0 || block >= a.cache.blocks)
        throw std::out_of_range("the block table names block " + std::to_string(block) + " of request " +
                                std::to_string(request) + ", but the cache has " +
                                std::to_string(a.cache.blocks));
      const char* from = cache_row(a.cache, block, key % a.cache.block_size);
      for (int64_t i = 0; i < a.cache.pieces; ++i)
        std::memcpy(a.rows + written * a.row_stride + i * a.cache.piece_bytes,
                    from + i * a.cache.piece_stride, static_cast<size_t>(a.cache.piece_bytes));
    }
  }
}

}  // namespace host_runtime::kernels
