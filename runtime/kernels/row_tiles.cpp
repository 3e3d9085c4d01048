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

/// The same of a whole tile that is neither scaled nor has a bias: rounded first, rows and columns are
/// exchanged in half the vectors, by instructions that stay within 128 bits. As the products of tiles do, it
/// takes denormals for zero.
KERNEL_INLINE void store_plain_tile(const Gemv& p, const float* sums, BFloat* out, int64_t row,
                                    int64_t column) {
  __m512i halves[8], words[8], found[8];
  for (int64_t i = 0; i < 8; ++i) {  // of columns i and i + 8
    const auto both =
        _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + (i + 8) * kRows), _mm512_load_ps(sums + i * kRows));
    halves[i] = bits_as<__m512i>(both);
  }
  for (int64_t i = 0; i < 4; ++i) {  // rows 0 to 3 and 8 to 11 in the first four, the others in the last
    words[i] = _mm512_maskz_unpacklo_epi16(~0u, halves[2 * i], halves[2 * i + 1]);
    words[4 + i] = _mm512_maskz_unpackhi_epi16(~0u, halves[2 * i], halves[2 * i + 1]);
  }
  for (int64_t i = 0; i < 8; i += 4) {  // rows r and r + 8 in found[r], in turn by eight columns
    const auto left = _mm512_maskz_unpacklo_epi32(0xffff, words[i], words[i + 1]);
    const auto right = _mm512_maskz_unpacklo_epi32(0xffff, words[i + 2], words[i + 3]);
    const auto next_left = _mm512_maskz_unpackhi_epi32(0xffff, words[i], words[i + 1]);
    const auto next_right = _mm512_maskz_unpackhi_epi32(0xffff, words[i + 2], words[i + 3]);
    found[i] = _mm512_maskz_unpacklo_epi64(0xff, left, right);
    found[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, left, right);
    found[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, next_left, next_right);
    found[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, next_left, next_right);
  }
  constexpr size_t kRowOfTile = kRows * sizeof(BFloat);
  const int64_t rows = p.rows - row;
  for (int64_t r = 0; r < std::min<int64_t>(8, rows); ++r) {
    const auto two = _mm512_maskz_shuffle_i64x2(0xff, found[r], found[r], _MM_SHUFFLE(3, 1, 2, 0));
    BFloat* to = out + (row + r) * p.out_row + column;
    std::memcpy(to, &two, kRowOfTile);
    if (r + 8 < rows)
      std::memcpy(to + 8 * p.out_row, reinterpret_cast<const char*>(&two) + kRowOfTile, kRowOfTile);
  }
}

/// Columns [begin, end) of all rows.
template <int kColumnTiles, int kRowTiles>
void columns_of(const Gemv& p, const BFloat* x, const BFloat* w, BFloat* out, int64_t begin, int64_t end) {
  alignas(64) float sums[4 * kRows * kRows];
  const Tiles tiles(kDepth);
  const bool plain = p.alpha == 1.0f && p.bias == nullptr;
  for (int64_t column = begin; column < end; column += kColumnTiles * kRows) {
    multiply<kColumnTiles, kRowTiles>(p, x, w + column * p.w_stride, p.columns - column, sums);
    const float* tile = sums;
    for (int64_t row = 0; row < p.rows; row += kRows) {
      for (int64_t i = 0; i < kColumnTiles; ++i, tile += kRows * kRows) {
        const int64_t first = column + i * kRows;
        if (plain && first + kRows <= p.columns) {
          store_plain_tile(p, tile, out, row, first);
        } else if (first < p.columns) {
          store_tile(p, tile, out, row, first);
        }
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
