#include "runtime/kernels/attention.h"

#include <ATen/Parallel.h>

#include <stdexcept>
#include <utility>

#include "runtime/kernels/attention_tile.h"

namespace host_runtime::kernels {
#define KERNEL_SOURCE "runtime/kernels/attention.inc"
#include "runtime/kernels/per_isa.h"

namespace {

/// Multiply-adds below which handing tiles to other threads costs more than it saves.
constexpr int64_t kParallelWork = int64_t{1} << 22;

std::vector<Tile> tiles_of(const Attention& a) {
  const int64_t group = a.heads / a.key_heads;
  const int64_t heads = std::min(group, kQueryTile);
  const int64_t tokens = std::max<int64_t>(1, kQueryTile / heads);
  std::vector<Tile> tiles;
  for (const Sequence& sequence : a.sequences)
    for (int64_t key_head = 0; key_head < a.key_heads; ++key_head)
      for (int64_t head = 0; head < group; head += heads)
        for (int64_t token = 0; token < sequence.query_length; token += tokens)
          tiles.push_back({&sequence, token, std::min(tokens, sequence.query_length - token),
                           key_head * group + head, std::min(heads, group - head), key_head});
  return tiles;
}

int64_t work_of(const Attention& a) {
  int64_t work = 0;
  for (const Sequence& sequence : a.sequences) work += sequence.query_length * sequence.key_length;
  return work * a.heads * (a.query.width + a.value.width);
}

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

}  // namespace

size_t attention_scratch(const Attention& arguments) {
  return static_cast<size_t>(TileScratch::floats(arguments) * at::get_num_threads()) * sizeof(float);
}

void attention(const Attention& arguments, void* scratch) {
  if (arguments.causal_probe != nullptr) check_compressed_mask(arguments.causal_probe);
  const std::vector<Tile> tiles = tiles_of(arguments);
  const int64_t floats = TileScratch::floats(arguments);
  const auto run = [&](int64_t begin, int64_t end) {
    float* memory = static_cast<float*>(scratch) + at::get_thread_num() * floats;
    visit(arguments.type, [&](auto zero) {
      const auto attend_tile = PER_ISA(attend<decltype(zero)>);
      for (int64_t i = begin; i < end; ++i) attend_tile(arguments, tiles[i], memory);
    });
  };
  const auto count = static_cast<int64_t>(tiles.size());
  if (work_of(arguments) < kParallelWork) {
    run(0, count);
  } else {
    at::parallel_for(0, count, 1, run);
  }
}

}  // namespace host_runtime::kernels
