#include "runtime/kernels/row_tiles.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "runtime/kernels/fetch.h"
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

/// With one or two rows the vector kernels keep pace, and need no x in tiles.
constexpr int64_t kLeastRows = 3;
constexpr int64_t kDepth = 32;             // of x and w that one instruction sums over
constexpr int64_t kTile = kRows * kDepth;  // halves
constexpr int64_t kSums = kRows * kRows;   // of a tile of columns and one of rows
constexpr int64_t kPairSums = 2 * kSums;

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

/// Rows of x in one of its tiles: as few as there are, so that they stay in the first level beside the
/// weights.
int64_t tile_rows(const Gemv& p) { return std::min(kRows, p.rows); }

/// x as second operands, [step][row tile][16 pairs of its columns][tile_rows][2].
void pack_rows(const Gemv& p, const BFloat* x, BFloat* to) {
  alignas(64) BFloat edge[kTile];
  const int64_t rows = tile_rows(p);
  const auto kept = static_cast<__mmask16>((1u << rows) - 1);
  for (int64_t k = 0; k < p.inner; k += kDepth) {
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const Operand from(x + row * p.x_row + k, p.x_row, p.rows - row, p.inner - k, edge);
      Lanes pairs[kRows];  // moved, never computed with
      for (int64_t i = 0; i < kRows; ++i) std::memcpy(&pairs[i], from.at + i * from.stride, sizeof(Lanes));
      transpose(pairs);
      for (int64_t i = 0; i < kRows; ++i, to += 2 * rows)
        _mm512_mask_storeu_ps(to, kept, bits_as<__m512>(pairs[i]));
    }
  }
}

/// Fetches the weights that come behind kColumns columns while those are multiplied: reading them is what a
/// product waits for. Columns without gaps are fetched in the order of their addresses, in which memory gives
/// most.
template <int64_t kColumns>
class Behind {
 public:
  Behind(const Gemv& p, const BFloat* w)
      : at_(w + kColumns * p.w_stride),
        apart_(p.w_stride == p.inner ? kDepth : p.w_stride),
        next_(p.w_stride == p.inner ? kColumns * kDepth : kDepth) {}

  /// As much as a step reads of all columns. Unrolled, the fetches come so fast that memory gives a sixth
  /// less.
  KERNEL_INLINE void fetch_step() {
    const BFloat* line = at_;
#pragma GCC unroll 1
    for (int64_t i = 0; i < kColumns; ++i, line += apart_) fetch_line(line);
    at_ += next_;
  }

 private:
  const BFloat* at_;
  int64_t apart_, next_;
};

/// Sums of 16 columns of w and a tile of x, to `sums` [column][row]. Of two steps at a time the fetches come
/// first: measured, that is worth 1.2 times of what they bring one step at a time, or between the tiles.
KERNEL_INLINE void multiply_one(const Gemv& p, const BFloat* x, const BFloat* w, int64_t columns,
                                float* sums) {
  alignas(64) BFloat edge[kTile];
  const int64_t rows = tile_rows(p), x_tile = kDepth * rows;
  const auto x_bytes = static_cast<size_t>(2 * rows) * sizeof(BFloat), w_bytes = p.w_stride * sizeof(BFloat);
  Behind<kRows> behind(p, w);
  _tile_zero(0);
  int64_t k = 0;
  for (; columns >= kRows && k + 2 * kDepth <= p.inner; k += 2 * kDepth, x += 2 * x_tile) {
    behind.fetch_step();
    behind.fetch_step();
    _tile_loadd(6, x, x_bytes);
    _tile_loadd(7, x + x_tile, x_bytes);
    _tile_loadd(4, w + k, w_bytes);
    _tile_loadd(5, w + k + kDepth, w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(0, 5, 7);
  }
  for (; k < p.inner; k += kDepth, x += x_tile) {
    const Operand first(w + k, p.w_stride, columns, p.inner - k, edge);
    written();
    _tile_loadd(4, first.at, first.stride * sizeof(BFloat));
    _tile_loadd(6, x, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, sums, kRowBytes);
  written();
}

/// As multiply_one, of kColumnTiles * 16 columns of w and kRowTiles tiles of x, to `sums` [row tile][column
/// tile, two of them][column][row].
template <int kColumnTiles, int kRowTiles>
KERNEL_INLINE void multiply(const Gemv& p, const BFloat* x, const BFloat* w, int64_t columns, float* sums) {
  static_assert(kColumnTiles * kRowTiles <= 4 && kRowTiles > 1, "as many sums as there are tiles for");
  constexpr bool kTwo = kColumnTiles == 2;
  alignas(64) BFloat edges[kColumnTiles * kTile];
  Behind<kColumnTiles * kRows> behind(p, w);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < p.inner; k += kDepth, w += kDepth, x += kRowTiles * kTile) {
    if constexpr (kTwo) {
      behind.fetch_step();
    } else {  // with as much to compute, asking once is enough
      for (int64_t i = 0; i < kRows; ++i) __builtin_prefetch(w + (kRows + i) * p.w_stride, 0, 2);
    }
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
    _tile_loadd(7, x + kTile, kRowBytes);
    if constexpr (kTwo) {
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbf16ps(1, 4, 7);
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
  constexpr int64_t kNext = kTwo ? kSums : kPairSums;
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kNext, kRowBytes);
  _tile_stored(2, sums + 2 * kNext, kRowBytes);
  if constexpr (kColumnTiles * kRowTiles == 4) _tile_stored(3, sums + 3 * kNext, kRowBytes);
  written();
}

/// Rounds a tile of sums [column][row] and stores `rows` rows of it, `stride` apart. Rounded first, rows and
/// columns are exchanged in half the vectors, by instructions that stay within 128 bits. As the products of
/// tiles do, it takes denormals for zero.
KERNEL_INLINE void store_tile(const float* sums, BFloat* out, int64_t rows, int64_t stride) {
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
  for (int64_t r = 0; r < std::min<int64_t>(8, rows); ++r) {
    const auto two = _mm512_maskz_shuffle_i64x2(0xff, found[r], found[r], _MM_SHUFFLE(3, 1, 2, 0));
    BFloat* to = out + r * stride;
    std::memcpy(to, &two, kRowOfTile);
    if (r + 8 < rows)
      std::memcpy(to + 8 * stride, reinterpret_cast<const char*>(&two) + kRowOfTile, kRowOfTile);
  }
}

/// `count` columns of a row of sums: scaled, with the bias.
KERNEL_INLINE Lanes finished(const Gemv& p, Lanes sums, int64_t row, int64_t column, int64_t count) {
  if (p.alpha != 1.0f) sums *= p.alpha;
  if (p.bias != nullptr && count > 0)
    sums += load_at(static_cast<const BFloat*>(p.bias) + row * p.bias_row, column, count) * p.beta;
  return sums;
}

/// Results of kRowTiles tiles of rows, rounded, on their way to `out`. They are written in runs of kWidth
/// columns: with a line here and a line there, in as many pages as there are rows, a product of 8 rows takes
/// a tenth longer.
template <int kRowTiles>
class Results {
 public:
  /// `column`: the first one, counted in p.
  Results(const Gemv& p, BFloat* out, int64_t column) : p_(p), out_(out), first_(column), next_(column) {}

  /// The next two tiles of columns, of sums [row tile][column tile][column][row]. What lies beyond p.columns
  /// is not kept.
  KERNEL_INLINE void add_pair(const float* sums) {
    if (next_ - first_ == kWidth) write();
    const bool direct = kRowTiles > 1 && next_ + 2 * kLanes <= p_.columns;
    BFloat* to = direct ? out_ + next_ : kept_ + (next_ - first_);
    const int64_t stride = direct ? p_.out_row : kWidth;
    for (int64_t row = 0; row < p_.rows; row += kRows, sums += kPairSums)
      finish(sums, row, to + row * stride, stride);
    next_ += 2 * kLanes;
    if (direct) first_ = next_;
  }

  void write() {
    const auto bytes = static_cast<size_t>(std::min(next_, p_.columns) - first_) * sizeof(BFloat);
    for (int64_t row = 0; row < p_.rows; ++row)
      std::memcpy(static_cast<void*>(out_ + row * p_.out_row + first_), kept_ + row * kWidth, bytes);
    first_ = next_;
  }

 private:
  static constexpr int64_t kWidth = kRowTiles == 1 ? 256 : 2 * kLanes;

  KERNEL_INLINE void finish(const float* sums, int64_t row, BFloat* to, int64_t stride) {
    const int64_t end = std::min(kRows, p_.rows - row);
    if (p_.alpha == 1.0f && p_.bias == nullptr) {
      store_tile(sums, to, end, stride);
      return store_tile(sums + kSums, to + kRows, end, stride);
    }
    Lanes left[kLanes], right[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) left[i] = load(sums + i * kRows);
    for (int64_t i = 0; i < kLanes; ++i) right[i] = load(sums + kSums + i * kRows);
    transpose(left);
    transpose(right);
    const int64_t count = lanes_at(next_, p_.columns), more = lanes_at(next_ + kLanes, p_.columns);
    for (int64_t m = 0; m < end; ++m, to += stride) {
      const Lanes low = finished(p_, left[m], row + m, next_, count);
      const Lanes high = finished(p_, right[m], row + m, next_ + kLanes, more);
      const __m512bh both = _mm512_cvtne2ps_pbh(bits_as<__m512>(high), bits_as<__m512>(low));
      std::memcpy(static_cast<void*>(to), &both, sizeof(both));
    }
  }

  const Gemv& p_;
  BFloat* out_;
  int64_t first_, next_;
  alignas(64) BFloat kept_[kRowTiles * kRows * kWidth];
};

/// Columns [begin, end) of all rows. Of one tile of rows a pair of tiles is finished when the next one has
/// begun, and not while its last products are under way; more rows have no room for it in the first level.
template <int kRowTiles>
void columns_of(const Gemv& p, const BFloat* x, const BFloat* w, BFloat* out, int64_t begin, int64_t end) {
  constexpr bool kLater = kRowTiles == 1;
  alignas(64) float sums[kLater ? 2 : 1][kRowTiles * kPairSums] = {};
  const Tiles tiles(kDepth, tile_rows(p));
  Results<kRowTiles> results(p, out, begin);
  int turn = 0;
  for (int64_t column = begin; column < end; column += 2 * kRows, turn ^= kLater) {
    const BFloat* from = w + column * p.w_stride;
    const int64_t columns = p.columns - column;
    const auto multiply_from = [&](int64_t tile) __attribute__((always_inline)) {
      const BFloat* first = from + tile * kRows * p.w_stride;
      float* to = sums[turn] + tile * kSums;
      if constexpr (kRowTiles == 1) multiply_one(p, x, first, columns - tile * kRows, to);
      if constexpr (kRowTiles == 2) multiply<2, 2>(p, x, first, columns, to);
      if constexpr (kRowTiles > 2) multiply<1, kRowTiles>(p, x, first, columns - tile * kRows, to);
    };
    multiply_from(0);
    if (kLater && column > begin) results.add_pair(sums[turn ^ 1]);
    if (kRowTiles != 2 && columns > kRows) multiply_from(1);
    if (!kLater) results.add_pair(sums[0]);
  }
  if (kLater) results.add_pair(sums[turn ^ 1]);
  results.write();
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
  const auto run = row_tiles == 1   ? &columns_of<1>
                   : row_tiles == 2 ? &columns_of<2>
                   : row_tiles == 3 ? &columns_of<3>
                                    : &columns_of<4>;
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
