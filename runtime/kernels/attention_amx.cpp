#include "runtime/kernels/attention_amx.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "runtime/kernels/attention_tile.h"
#include "runtime/kernels/isa.h"
#include "runtime/kernels/scalar.h"

namespace host_runtime::kernels {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
namespace {

#define KERNEL_LANES 16
#define KERNEL_DOTS
// clang-format off: in this order
#include "runtime/kernels/simd.inc"
#include "runtime/kernels/tiles.inc"
#include "runtime/kernels/panels.inc"
#include "runtime/kernels/attention.inc"
// clang-format on
#undef KERNEL_DOTS
#undef KERNEL_LANES

constexpr int64_t kKeyBlock = 256;
constexpr int64_t kRowStep = 2 * kRows;
constexpr float kLog2E = 1.44269504f;

/// The scratch of one worker. Widths are padded with zeros to whole tiles.
struct AmxScratch {
  int64_t depth, value_width;
  BFloat* query;     ///< [kAmxQueryTile][depth]
  BFloat* keys;      ///< panels [kKeyBlock / 16] of depth
  BFloat* values;    ///< panels [value_width / 16] of kKeyBlock
  BFloat* gathered;  ///< [kTileDepth][depth or value_width]
  BFloat* weights;   ///< [kRowStep][kKeyBlock]
  float* scores;     ///< [kRowStep][kKeyBlock]
  float* output;     ///< [kAmxQueryTile][value_width]
  float* maximum;    ///< [kAmxQueryTile], of scores
  float* total;      ///< [kAmxQueryTile]

  static int64_t key_depth(const Attention& a) {
    return round_up(a.query.width + a.query_rope.width, kTileDepth);
  }
  static int64_t padded_value(const Attention& a) { return round_up(a.value.width, kRows); }
  static int64_t floats(const Attention& a) {
    const int64_t depth = key_depth(a), width = padded_value(a);
    const int64_t halves = (kAmxQueryTile + kKeyBlock) * depth + kKeyBlock * width +
                           kTileDepth * std::max(depth, width) + kRowStep * kKeyBlock;
    return halves / 2 + kRowStep * kKeyBlock + kAmxQueryTile * (width + 2);
  }
  AmxScratch(const Attention& a, float* memory) : depth(key_depth(a)), value_width(padded_value(a)) {
    const auto floats = [&memory](int64_t count) { return std::exchange(memory, memory + count); };
    const auto halves = [&floats](int64_t count) { return reinterpret_cast<BFloat*>(floats(count / 2)); };
    query = halves(kAmxQueryTile * depth);
    keys = halves(kKeyBlock * depth);
    values = halves(kKeyBlock * value_width);
    gathered = halves(kTileDepth * std::max(depth, value_width));
    weights = halves(kRowStep * kKeyBlock);
    scores = floats(kRowStep * kKeyBlock);
    output = floats(kAmxQueryTile * value_width);
    maximum = floats(kAmxQueryTile);
    total = floats(kAmxQueryTile);
  }
};

/// Copies one row as it is.
KERNEL_INLINE void gather_row(const HeadRows& rows, const BFloat* from, BFloat* to) {
  for (int64_t start = 0; start < rows.width; start += rows.chunk, from += rows.chunk_stride)
    std::memcpy(to + start, from, static_cast<size_t>(rows.chunk) * sizeof(BFloat));
}

KERNEL_INLINE void clear(BFloat* from, const BFloat* end) {
  if (from < end) std::memset(from, 0, static_cast<size_t>(end - from) * sizeof(BFloat));
}

void gather_queries(const Attention& a, const Tile& tile, const AmxScratch& s) {
  const Sequence& sequence = a.sequences[tile.sequence];
  BFloat* to = s.query;
  for (int64_t row = 0; row < tile.rows(); ++row, to += s.depth) {
    gather_row(a.query, query_row<BFloat>(a.query, sequence.query_offset, tile, row), to);
    if (a.query_rope.width > 0)
      gather_row(a.query_rope, query_row<BFloat>(a.query_rope, sequence.query_rope_offset, tile, row),
                 to + a.query.width);
    clear(to + a.query.width + a.query_rope.width, to + s.depth);
  }
  clear(to, s.query + round_up(tile.rows(), kRows) * s.depth);
}

/// Keys [first, first + keys) as the columns of a product, padded with zeros to whole pairs of tiles.
void pack_keys(const Attention& a, const Tile& tile, const AmxScratch& s, int64_t first, int64_t keys) {
  const Sequence& sequence = a.sequences[tile.sequence];
  const int64_t width = a.key.width + a.key_rope.width;
  constexpr int64_t kBytes = sizeof(BFloat);
  for (int64_t start = 0; start < round_up(keys, kTileDepth); start += kRows) {
    const int64_t count = std::clamp<int64_t>(keys - start, 0, kRows);
    const RowPointers<BFloat> rows(a, a.key, sequence.key_offset, tile, first + start, count);
    for (int64_t j = 0; j < count; ++j) {
      BFloat* to = s.gathered + j * s.depth;
      gather_row(a.key, rows.at[j], to);
      clear(to + width, to + s.depth);
    }
    if (a.key_rope.width > 0) {
      const RowPointers<BFloat> ropes(a, a.key_rope, sequence.key_rope_offset, tile, first + start, count);
      for (int64_t j = 0; j < count; ++j)
        gather_row(a.key_rope, ropes.at[j], s.gathered + j * s.depth + a.key.width);
    }
    clear(s.gathered + count * s.depth, s.gathered + kRows * s.depth);
    BFloat* panel = s.keys + start * s.depth;
    for (int64_t d = 0; d < s.depth; d += kTileDepth)
      words_of_columns(s.gathered + d, s.depth * kBytes, kRowBytes / 2, panel + d * kRows);
  }
}

void pack_values(const Attention& a, const Tile& tile, const AmxScratch& s, int64_t first, int64_t keys) {
  for (int64_t start = 0; start < keys; start += kTileDepth) {
    const int64_t count = std::min(keys - start, kTileDepth);
    const RowPointers<BFloat> rows(a, a.value, a.sequences[tile.sequence].value_offset, tile, first + start,
                                   count);
    for (int64_t j = 0; j < count; ++j) {
      BFloat* to = s.gathered + j * s.value_width;
      gather_row(a.value, rows.at[j], to);
      clear(to + a.value.width, to + s.value_width);
    }
    clear(s.gathered + count * s.value_width, s.gathered + kTileDepth * s.value_width);
    for (int64_t column = 0; column < s.value_width; column += kRows)
      pack_rows(s.gathered + column, s.value_width, s.values + column * kKeyBlock + start * kRows,
                kTileDepth);
  }
}

/// 2^a for a <= 0 within 1e-7 of it, by a polynomial on [-1/2, 1/2]; 0 below -126 and for -inf, NaN stays
/// NaN.
KERNEL_INLINE Lanes power_of_two(Lanes a) {
  const auto raw = bits_as<__m512>(a);
  const __mmask16 normal = _mm512_cmp_ps_mask(raw, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 whole = _mm512_maskz_roundscale_ps(normal, raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Lanes rest = a - bits_as<Lanes>(whole);
  Lanes series = splat(1.3276472454890609e-3f);
  series = series * rest + splat(9.675541892647743e-3f);
  series = series * rest + splat(5.550713092088699e-2f);
  series = series * rest + splat(2.4022120237350464e-1f);
  series = series * rest + splat(6.931469440460205e-1f);
  series = series * rest + splat(1.0000001192092896f);
  return bits_as<Lanes>(_mm512_maskz_scalef_ps(normal, bits_as<__m512>(series), whole));
}

/// What a row sees of a block: `count` scores, the first of which is for key `first`.
struct ScoreRow {
  int64_t row;
  int64_t first;
  int64_t keys;   ///< of `count`, those that exist
  int64_t count;  ///< a multiple of 32
};

/// Turns the scores of a row into weights against its running maximum, and rescales what it summed so far.
void softmax_row(const Attention& a, const Tile& tile, const AmxScratch& s, const ScoreRow& r, float* scores,
                 BFloat* weights) {
  const bool finished = a.bias != nullptr || a.mask != nullptr || !(a.scale > 0);
  if (finished) {
    finish_scores<BFloat>(a, tile, scores, r.row, r.first, r.keys, r.count);
  } else {
    hide_keys(a, tile, scores, r.row, r.first, r.keys, r.count);
  }
  const float factor = finished ? 1.0f : a.scale;
  Lanes best = load(scores);
  for (int64_t j = kLanes; j < r.count; j += kLanes) best = maximum(best, load(scores + j));
  const float previous = s.maximum[r.row];
  const float now = std::max(previous, largest(best) * factor);
  if (now == kNothing) return clear(weights, weights + r.count);
  // What a bias hides may be the lowest float, and log2(e) times that is -inf: there the maximum goes first.
  const float step = factor * kLog2E, shift = now * kLog2E;
  const auto weigh = [=](Lanes x) { return power_of_two(finished ? (x - now) * kLog2E : x * step - shift); };
  Lanes sums[2] = {};
  for (int64_t j = 0; j < r.count; j += 2 * kLanes) {
    const Lanes left = weigh(load(scores + j));
    const Lanes right = weigh(load(scores + j + kLanes));
    sums[0] += left;
    sums[1] += right;
    const __m512bh pair = _mm512_cvtne2ps_pbh(bits_as<__m512>(right), bits_as<__m512>(left));
    std::memcpy(weights + j, &pair, sizeof(pair));
  }
  s.maximum[r.row] = now;
  float shrink = 1.0f;
  if (now != previous && previous != kNothing) {
    shrink = power_of_two(splat((previous - now) * kLog2E))[0];
    float* output = s.output + r.row * s.value_width;
    for (int64_t i = 0; i < s.value_width; i += kLanes) store(output + i, load(output + i) * shrink);
  }
  s.total[r.row] = s.total[r.row] * shrink + sum(sums[0] + sums[1]);
}

/// Up to 32 rows of the tile against a packed block of keys and values.
void attend_block(const Attention& a, const Tile& tile, const AmxScratch& s, int64_t row, int64_t first,
                  int64_t keys) {
  const Sequence& sequence = a.sequences[tile.sequence];
  const int64_t rows = std::min(tile.rows() - row, kRowStep);
  const KeyRange oldest = visible_keys(a, sequence, tile.token + row / tile.heads);
  const KeyRange newest = visible_keys(a, sequence, tile.token + (row + rows - 1) / tile.heads);
  const int64_t begin = std::clamp<int64_t>(oldest.begin - first, 0, keys) / kTileDepth * kTileDepth;
  const int64_t end = std::clamp<int64_t>(newest.end - first, 0, keys);
  if (end <= begin) return;
  const int64_t count = round_up(end - begin, kTileDepth);
  multiply_panels(rows, s.query + row * s.depth, s.depth, s.keys + begin * s.depth, kRows * s.depth, s.scores,
                  kKeyBlock, count, s.depth / kTileDepth, false);
  for (int64_t i = 0; i < rows; ++i)
    softmax_row(a, tile, s, {row + i, first + begin, end - begin, count}, s.scores + i * kKeyBlock,
                s.weights + i * kKeyBlock);
  written();
  multiply_panels(rows, s.weights, kKeyBlock, s.values + begin * kRows, kRows * kKeyBlock,
                  s.output + row * s.value_width, s.value_width, s.value_width, count / kTileDepth, true);
}

}  // namespace

bool takes_amx(const Attention& a) {
  return a.type == Type::kBFloat && this_machine() >= InstructionSet::kTiles;
}

int64_t amx_scratch(const Attention& a) { return AmxScratch::floats(a); }

void attend_amx(const Attention& a, const Tile& tile, float* scratch) {
  const AmxScratch s(a, scratch);
  gather_queries(a, tile, s);
  for (int64_t row = 0; row < tile.rows(); ++row) {
    const float start = a.sink == nullptr ? kNothing : a.sink[tile.head + row % tile.heads];
    s.maximum[row] = start;
    s.total[row] = start == kNothing ? 0.0f : 1.0f;
  }
  std::fill_n(s.output, round_up(tile.rows(), kRows) * s.value_width, 0.0f);
  const Sequence& sequence = a.sequences[tile.sequence];
  const KeyRange oldest = visible_keys(a, sequence, tile.token);
  const KeyRange newest = visible_keys(a, sequence, tile.token + tile.tokens - 1);
  const Tiles tiles(kTileDepth);
  for (int64_t first = oldest.begin / kTileDepth * kTileDepth; first < newest.end; first += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, newest.end - first);
    pack_keys(a, tile, s, first, keys);
    pack_values(a, tile, s, first, keys);
    written();
    for (int64_t row = 0; row < tile.rows(); row += kRowStep) attend_block(a, tile, s, row, first, keys);
  }
  store_rows<BFloat>(a, tile, {s.output, s.value_width, s.maximum, s.total});
}

#pragma GCC pop_options
#else

bool takes_amx(const Attention&) { return false; }
int64_t amx_scratch(const Attention&) { return 0; }
void attend_amx(const Attention&, const Tile&, float*) { throw std::logic_error("no tiles on this machine"); }

#endif

}  // namespace host_runtime::kernels
