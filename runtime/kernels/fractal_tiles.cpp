#include "runtime/kernels/fractal_tiles.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "runtime/kernels/fetch.h"
#include "runtime/kernels/isa.h"
#include "runtime/kernels/scalar.h"
#include "runtime/kernels/share.h"

namespace host_runtime::kernels {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")
namespace {

#define KERNEL_LANES 16
#include "runtime/kernels/simd.inc"
#undef KERNEL_LANES

#include "runtime/kernels/tiles.inc"

/// Below that many rows the vector kernels keep pace: their weights come from a cache, or columns lie
/// together.
constexpr int64_t kLeastRows = 5;
/// More weights than that, in rows, come from memory, of which the vector kernels' four columns at a time get
/// less than half of what tiles do.
constexpr int64_t kCachedWeights = int64_t{1} << 20;
constexpr int64_t kDepth = kFractalWidth;  // of x and w that one instruction sums over

/// Two rows of 16 halves in turn, as the second operand of a product wants them.
KERNEL_INLINE void interleave(const BFloat* first, const BFloat* second, BFloat* to) {
  const WordLanes pairs = load_words(first) | load_words(second) << 16;
  std::memcpy(to, &pairs, sizeof(pairs));
}

struct Arguments {
  const FractalProduct& p;
  const BFloat* x;    ///< in tiles
  int64_t row_tiles;  ///< 1 or 2
  int64_t depth;      ///< inner, in whole fractals

  /// Halves between two tiles of x that lie one behind the other in depth.
  static constexpr int64_t kTile = kRows * kDepth;
};

/// x in tiles [row tile, depth tile] of 16 x 16, padded with zeros. by_rows: x is the second operand, so its
/// tiles hold pairs of its columns, [8, 16 rows, 2]; else the first one, [16 rows, 16].
void pack_rows(const Arguments& a, BFloat* to) {
  const auto* x = static_cast<const BFloat*>(a.p.x);
  std::memset(to, 0, static_cast<size_t>(a.row_tiles * kRows * a.depth) * sizeof(BFloat));
  for (int64_t row = 0; row < a.p.rows; ++row, x += a.p.inner) {
    BFloat* tile = to + row / kRows * kRows * a.depth;
    const int64_t m = row % kRows;
    for (int64_t k = 0; k < a.p.inner; ++k) {
      const int64_t at = a.p.by_rows ? k % kDepth / 2 * 2 * kRows + 2 * m + k % 2 : m * kDepth + k % kDepth;
      tile[k / kDepth * Arguments::kTile + at] = x[k];
    }
  }
}

/// Sums of 16 packed rows of w (columns of the result) and x, [column, row], to `sums` [row tile][16][16].
template <bool kTwo>
void packed_rows(const Arguments& a, int64_t column, float* sums) {
  const BFloat* w = static_cast<const BFloat*>(a.p.w) + column * kFractalWidth;
  const BFloat* x = a.x;
  _tile_zero(0);
  if (kTwo) _tile_zero(1);
  for (int64_t k = 0; k < a.depth; k += kDepth, w += a.p.block, x += Arguments::kTile) {
    _tile_loadd(4, w, kFractalWidth * sizeof(BFloat));
    _tile_loadd(6, x, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwo) {
      _tile_loadd(7, x + kRows * a.depth, kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, sums, kRowBytes);
  if (kTwo) _tile_stored(1, sums + kRows * kFractalWidth, kRowBytes);
}

/// The same of kTogether tiles of columns and one of x, to `sums` [column tile][16][16]: at each step 2 KiB
/// lie together. Those of the step after next are fetched meanwhile, as reading w is what the product waits
/// for.
constexpr int64_t kTogether = 4;
void packed_rows_together(const Arguments& a, int64_t column, float* sums) {
  constexpr int64_t kFractal = kRows * kFractalWidth;
  constexpr size_t kBytes = kFractalWidth * sizeof(BFloat);
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(BFloat));
  const BFloat* w = static_cast<const BFloat*>(a.p.w) + column * kFractalWidth;
  const BFloat* x = a.x;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < a.depth; k += kDepth, w += a.p.block, x += Arguments::kTile) {
    const BFloat* behind = w + 2 * a.p.block;
#pragma GCC unroll 1
    for (int64_t i = 0; i < kTogether * kFractal; i += kLine) __builtin_prefetch(behind + i, 0, 2);
    _tile_loadd(6, x, kRowBytes);
    _tile_loadd(4, w, kBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + kFractal, kBytes);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, w + 2 * kFractal, kBytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, w + 3 * kFractal, kBytes);
    _tile_dpbf16ps(3, 5, 6);
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kFractal, kRowBytes);
  _tile_stored(2, sums + 2 * kFractal, kRowBytes);
  _tile_stored(3, sums + 3 * kFractal, kRowBytes);
  written();
}

/// Sums of x and 16 columns that lie together in w, [row, column].
template <bool kTwo>
void packed_columns(const Arguments& a, int64_t column, float* sums) {
  const BFloat* w = static_cast<const BFloat*>(a.p.w) + column / kFractalWidth * a.p.block;
  const BFloat* x = a.x;
  alignas(64) BFloat pairs[Arguments::kTile];
  _tile_zero(0);
  if (kTwo) _tile_zero(1);
  for (int64_t k = 0; k < a.depth; k += kDepth, x += Arguments::kTile) {
    for (int64_t i = 0; i < kDepth; i += 2, w += 2 * kFractalWidth)
      interleave(w, w + kFractalWidth, pairs + i * kFractalWidth);
    written();
    _tile_loadd(6, pairs, kRowBytes);
    _tile_loadd(4, x, kDepth * sizeof(BFloat));
    _tile_dpbf16ps(0, 4, 6);
    if (kTwo) {
      _tile_loadd(5, x + kRows * a.depth, kDepth * sizeof(BFloat));
      _tile_dpbf16ps(1, 5, 6);
    }
  }
  _tile_stored(0, sums, kRowBytes);
  if (kTwo) _tile_stored(1, sums + kRows * kFractalWidth, kRowBytes);
}

/// Adds the bias to 16 columns of sums, rounds and stores them.
void store_columns(const Arguments& a, const float* sums, int64_t column) {
  const int64_t count = lanes_at(column, a.p.columns);
  const auto* given = static_cast<const BFloat*>(a.p.bias);
  const Lanes bias = given == nullptr ? Lanes{} : load_at(given, column, count);
  for (int64_t row = 0; row < a.p.rows; row += kRows, sums += kRows * kFractalWidth) {
    Lanes found[kRows];
    for (int64_t i = 0; i < kRows; ++i) found[i] = load(sums + i * kFractalWidth);
    if (a.p.by_rows) transpose(found);  // their sums lie [column, row]
    BFloat* out = static_cast<BFloat*>(a.p.out) + row * a.p.columns;
    for (int64_t m = 0; m < std::min(kRows, a.p.rows - row); ++m, out += a.p.columns)
      store_at(out, column, found[m] + bias, count);
  }
}

template <bool kTwo>
void columns_of(const Arguments& a, int64_t begin, int64_t end) {
  alignas(64) float sums[kTogether * kRows * kFractalWidth];
  const Tiles tiles(kDepth);
  int64_t column = begin;
  if (!kTwo && a.p.by_rows) {
    for (; column + kTogether * kFractalWidth <= end; column += kTogether * kFractalWidth) {
      packed_rows_together(a, column, sums);
      for (int64_t i = 0; i < kTogether; ++i)
        store_columns(a, sums + i * kRows * kFractalWidth, column + i * kFractalWidth);
    }
  }
  for (; column < end; column += kFractalWidth) {
    a.p.by_rows ? packed_rows<kTwo>(a, column, sums) : packed_columns<kTwo>(a, column, sums);
    store_columns(a, sums, column);
  }
}

}  // namespace

bool takes_tiles(const FractalProduct& product) {
  const bool few = product.rows < kLeastRows;
  const bool from_memory = product.inner * product.columns > kCachedWeights;
  return product.type == Type::kBFloat && (!few || (product.by_rows && from_memory)) &&
         product.rows <= kFractalTilesRows && this_machine() >= InstructionSet::kTiles;
}

void fractal_tiles(const FractalProduct& product, float* scratch) {
  auto* packed = reinterpret_cast<BFloat*>(scratch);
  const Arguments a{product, packed, (product.rows + kRows - 1) / kRows,
                    (product.inner + kDepth - 1) / kDepth * kDepth};
  pack_rows(a, packed);
  const auto run = a.row_tiles == 1 ? &columns_of<false> : &columns_of<true>;
  share_columns(product.inner, product.columns, 4 * kFractalWidth,
                [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

#pragma GCC pop_options
#else

bool takes_tiles(const FractalProduct&) { return false; }
void fractal_tiles(const FractalProduct&, float*) { throw std::logic_error("no tiles on this machine"); }

#endif

}  // namespace host_runtime::kernels
