#include "runtime/kernels/row_tiles.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "runtime/kernels/isa.h"
#include "runtime/kernels/scalar.h"
#include "runtime/kernels/share.h"

namespace host_runtime::kernels {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
namespace {

#define KERNEL_LANES 16
#include "runtime/kernels/simd.inc"
#undef KERNEL_LANES
#include "runtime/kernels/tiles.inc"

constexpr int64_t kDepth = 32;             // of x and w that one instruction sums over
constexpr int64_t kTile = kRows * kDepth;  // halves

int64_t row_tiles_of(const Gemv& p) { return (p.rows + kRows - 1) / kRows; }
int64_t steps_of(const Gemv& p) { return (p.inner + kDepth - 1) / kDepth; }

/// 16 rows at most of kDepth halves at most, where they lie or, at an end, in `edge`, padded with zeros.
struct Operand {
  const BFloat* at;
  int64_t stride;

  KERNEL_INLINE Operand(const BFloat* from, int64_t stride, int64_t rows, int64_t depth, BFloat* edge)
      : at(from), stride(stride) {
    if (rows >= kRows && depth >= kDepth) return;
    std::memset(edge, 0, kTile * sizeof(BFloat));
    const auto bytes = static_cast<size_t>(std::min(depth, kDepth)) * sizeof(BFloat);
    for (int64_t i = 0; i < std::min(rows, kRows); ++i)
      std::memcpy(edge + i * kDepth, from + i * stride, bytes);
    this->at = edge;
    this->stride = kDepth;
  }
};

/// x as second operands, [step][row tile][16 pairs of its columns][16 rows][2].
void pack_rows(const Gemv& p, const BFloat* x, BFloat* to) {
  alignas(64) BFloat edge[kTile];
  for (int64_t k = 0; k < p.inner; k += kDepth) {
    for (int64_t row = 0; row < p.rows; row += kRows, to += kTile) {
      const Operand from(x + row * p.x_row + k, p.x_row, p.rows - row, p.inner - k, edge);
      Lanes pairs[kRows];  // moved, never computed with
      for (int64_t i = 0; i < kRows; ++i) std::memcpy(&pairs[i], from.at + i * from.stride, sizeof(Lanes));
      transpose(pairs);
      std::memcpy(to, pairs, sizeof(pairs));
    }
  }
}

/// Sums of kColumnTiles * 16 columns of w and kRowTiles * 16 rows of x, to `sums` [row tile][column
/// tile][column][row]. The weights that come behind are fetched meanwhile: reading them is what the product
/// waits for.
template <int kColumnTiles, int kRowTiles>
KERNEL_INLINE void multiply(const Gemv& p, const BFloat* x, const BFloat* w, int64_t columns, float* sums) {
  static_assert(kColumnTiles * kRowTiles <= 4, "as many sums as there are tiles for");
  constexpr bool kTwo = kColumnTiles == 2;
  alignas(64) BFloat edges[kColumnTiles * kTile];
  const int64_t behind = kColumnTiles * kRows * p.w_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < p.inner; k += kDepth, w += kDepth, x += kRowTiles * kTile) {
    // To the second level: for the first, what comes behind is too much beside what is multiplied.
    for (int64_t i = 0; i < kColumnTiles * kRows; ++i) __builtin_prefetch(w + behind + i * p.w_stride, 0, 2);
    const Operand first(w, p.w_stride, columns, p.inner - k, edges);
    written();
    _tile_loadd(4, first.at, first.stride * sizeof(BFloat));
    if constexpr (kTwo) {
      const Operand second(w + kRows * p.w_stride, p.w_stride, columns - kRows, p.inner - k, edges + kTile);
      written();
      _tile_loadd(5, second.at, second.stride * sizeof(BFloat));
    }
    _tile_loadd(6, x, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwo) _tile_dpbf16ps(1, 5, 6);
    if constexpr (kRowTiles > 1) {
      _tile_loadd(7, x + kTile, kRowBytes);
      if constexpr (kTwo) {
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    if constexpr (kRowTiles > 2) {
      _tile_loadd(6, x + 2 * kTile, kRowBytes);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (kRowTiles > 3) {
      _tile_loadd(7, x + 3 * kTile, kRowBytes);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  constexpr int64_t kSums = kRows * kRows;
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kSums, kRowBytes);
  _tile_stored(2, sums + 2 * kSums, kRowBytes);
  _tile_stored(3, sums + 3 * kSums, kRowBytes);
  written();
}

/// Scales 16 columns at most of 16 rows at most, adds the bias, rounds and stores them. `sums`:
/// [column][row].
KERNEL_INLINE void store_tile(const Gemv& p, const float* sums, BFloat* out, int64_t row, int64_t column) {
  Lanes found[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) found[i] = load(sums + i * kRows);
  transpose(found);
  const int64_t count = lanes_at(column, p.columns);
  const auto* bias = static_cast<const BFloat*>(p.bias);
  for (int64_t m = 0; m < std::min(kRows, p.rows - row); ++m) {
    Lanes value = found[m];
    if (p.alpha != 1.0f) value *= p.alpha;
    if (bias != nullptr) value += load_at(bias + (row + m) * p.bias_row, column, count) * p.beta;
    store_at(out + (row + m) * p.out_row, column, value, count);
  }
}

/// Columns [begin, end) of all rows.
template <int kColumnTiles, int kRowTiles>
void columns_of(const Gemv& p, const BFloat* x, const BFloat* w, BFloat* out, int64_t begin, int64_t end) {
  alignas(64) float sums[4 * kRows * kRows];
  const Tiles tiles(kDepth);
  for (int64_t column = begin; column < end; column += kColumnTiles * kRows) {
    multiply<kColumnTiles, kRowTiles>(p, x, w + column * p.w_stride, p.columns - column, sums);
    const float* tile = sums;
    for (int64_t row = 0; row < p.rows; row += kRows) {
      for (int64_t i = 0; i < kColumnTiles; ++i, tile += kRows * kRows) {
        if (column + i * kRows < p.columns) store_tile(p, tile, out, row, column + i * kRows);
      }
    }
  }
}

}  // namespace

bool takes_row_tiles(const Gemv& product, Type type, bool transposed) {
  return type == Type::kBFloat && transposed && product.rows >= kLeastRows && product.rows <= kRowTilesRows &&
         product.inner >= kDepth && product.columns >= kRows && this_machine() >= InstructionSet::kTiles;
}

size_t row_tiles_scratch(const Gemv& product) {
  return static_cast<size_t>(row_tiles_of(product) * steps_of(product) * kTile) * sizeof(BFloat);
}

void row_tiles(const Gemv& p, void* scratch) {
  auto* packed = static_cast<BFloat*>(scratch);
  const int64_t row_tiles = row_tiles_of(p);
  const auto run = row_tiles == 1   ? &columns_of<2, 1>
                   : row_tiles == 2 ? &columns_of<2, 2>
                   : row_tiles == 3 ? &columns_of<1, 3>
                                    : &columns_of<1, 4>;
  for (int64_t batch = 0; batch < p.batches; ++batch) {
    pack_rows(p, static_cast<const BFloat*>(p.x) + batch * p.x_batch, packed);
    const BFloat* w = static_cast<const BFloat*>(p.w) + batch * p.w_batch;
    BFloat* out = static_cast<BFloat*>(p.out) + batch * p.out_batch;
    share_columns(p.inner, p.columns, 4 * kRows,
                  [&](int64_t begin, int64_t end) { run(p, packed, w, out, begin, end); });
  }
}

#pragma GCC pop_options
#else

bool takes_row_tiles(const Gemv&, Type, bool) { return false; }
size_t row_tiles_scratch(const Gemv&) { return 0; }
void row_tiles(const Gemv&, void*) { throw std::logic_error("no tiles on this machine"); }

#endif

}  // namespace host_runtime::kernels
