#include "runtime/kernels/attention.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "runtime/kernels/attention_amx.h"
#include "runtime/kernels/attention_tile.h"
#include "runtime/kernels/fetch.h"
#include "runtime/kernels/share.h"

namespace host_runtime::kernels {
#define KERNEL_HAS_DOTS
#define KERNEL_SOURCE "runtime/kernels/attention_direct.inc"
#include "runtime/kernels/per_isa.h"

namespace {

/// Multiply-adds below which sharing tiles costs more than it saves.
constexpr int64_t kSharedWork = int64_t{1} << 16;

/// The compressed mask of the causal modes is a fixed 2048 x 2048 upper triangle of ones; the card computes
/// with its contents. A few probes find the usual mistakes: a lower triangle, zeros, or memory that was never
/// written.
void check_compressed_mask(const uint8_t* mask) {
  constexpr int64_t kSide = 2048;
  for (const int64_t row : {int64_t{0}, int64_t{1}, kSide / 2, kSide - 2})
    if (mask[row * kSide + row] != 0 || mask[row * kSide + row + 1] == 0)
      throw std::invalid_argument(
          "atten_mask of sparse_mode 2, 3 and 4 has to be 1 above the diagonal and 0 on and below it "
          "(torch.triu(torch.ones(2048, 2048), diagonal=1)); row " +
          std::to_string(row) + " is not");
}

/// The scratch of one worker.
int64_t scratch_floats(const Attention& a) {
  return std::max(TileScratch::floats(a), takes_amx(a) ? amx_scratch(a) : 0);
}

}  // namespace

void Attention::plan() {
  const int64_t group = heads / key_heads;
  const int64_t rows = takes_amx(*this) ? kAmxQueryTile : kQueryTile;
  const int64_t tile_heads = std::min(group, rows);
  const int64_t tile_tokens = std::max<int64_t>(1, rows / tile_heads);
  tiles.clear();
  work = 0;
  threads = at::get_num_threads();
  for (int64_t i = 0; i < static_cast<int64_t>(sequences.size()); ++i) {
    const int64_t tokens = sequences[i].query_length;
    work += tokens * sequences[i].key_length * heads * (query.width + value.width);
    for (int64_t key_head = 0; key_head < key_heads; ++key_head)
      for (int64_t head = 0; head < group; head += tile_heads)
        for (int64_t token = 0; token < tokens; token += tile_tokens)
          tiles.push_back({i, token, std::min(tile_tokens, tokens - token), key_head * group + head,
                           std::min(tile_heads, group - head), key_head});
  }
}

size_t attention_scratch(const Attention& arguments) {
  return static_cast<size_t>(scratch_floats(arguments) * arguments.threads) * sizeof(float);
}

void attention(const Attention& arguments, void* scratch) {
  if (arguments.causal_probe != nullptr) check_compressed_mask(arguments.causal_probe);
  const int64_t floats = scratch_floats(arguments);
  const bool amx = takes_amx(arguments);
  const auto count = static_cast<int64_t>(arguments.tiles.size());
  const auto run = [&](int64_t i, int64_t thread) {
    float* memory = static_cast<float*>(scratch) + thread * floats;
    const Tile& tile = arguments.tiles[static_cast<size_t>(i)];
    const Tile* next = i + 1 < count ? &tile + 1 : nullptr;
    visit(arguments.type, [&](auto zero) {
      const auto attend_tile = PER_ISA_OR_DOTS(attend<decltype(zero)>);
      amx&& tile.rows() > kDirectRows ? attend_amx(arguments, tile, memory)
                                      : attend_tile(arguments, tile, next, memory);
    });
  };
  run_parts(count, arguments.work < kSharedWork ? 1 : std::min(arguments.threads, kernel_threads()), run);
}

}  // namespace host_runtime::kernels
