#include "runtime/kernels/panel_product.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>

#include "runtime/kernels/isa.h"
#include "runtime/kernels/scalar.h"
#include "runtime/kernels/share.h"

namespace host_runtime::kernels {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,avx512vbmi,amx-tile,amx-bf16,amx-int8,prefer-vector-width=512")
namespace {

#define KERNEL_LANES 16
#define KERNEL_DOTS
// clang-format off: in this order
#include "runtime/kernels/simd.inc"
#include "runtime/kernels/tiles.inc"
#include "runtime/kernels/int8_product.inc"
// clang-format on
#undef KERNEL_DOTS
#undef KERNEL_LANES

constexpr int64_t kTileBytes = kRows * kRowBytes;
constexpr int64_t kRunBytes = 32;
/// Elements of a run, of the inner dimension in a tile's row, and of it in one word of a panel.
template <typename T>
constexpr int64_t kRun = kRunBytes / static_cast<int64_t>(sizeof(T));
template <typename T>
constexpr int64_t kDepth = kRowBytes / static_cast<int64_t>(sizeof(T));
template <typename T>
constexpr int64_t kGroup = 4 / static_cast<int64_t>(sizeof(T));

/// Two tiles of rows or of columns lie in turn, [step][2], so that a step reads 2 KiB in a piece.
constexpr int64_t kPair = 2 * kRows;
constexpr int64_t kPairBytes = 2 * kTileBytes;
constexpr int64_t kPairSums = kPair * kPair;

constexpr int64_t kRowBlock = 512;   // of x, in tiles at a time
constexpr int64_t kDepthBlock = 32;  // steps of them, so that they stay in the second cache beside the panels
constexpr int64_t kStepBlock = 12;   // of 32 rows, which stay in the first cache while the panels pass it
constexpr int64_t kPanelBytes = 128 * 1024;
constexpr int64_t kSumColumns = 1024;  // whose sums wait for the next block of depth
constexpr int64_t kShareColumns = 64;  // a thread's at least

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

/// Memory of a thread that is kept from call to call, as every product of a step needs it again; in huge
/// pages where Linux gives some, since a product walks through all of it again and again.
class Kept {
 public:
  std::byte* room(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      bytes = round_up(bytes, kHugePage);
      memory_.reset(static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), kAlignment)));
      size_ = bytes;
      madvise(memory_.get(), static_cast<size_t>(bytes), MADV_HUGEPAGE);
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t kHugePage = int64_t{2} << 20;
  static constexpr std::align_val_t kAlignment{kHugePage};
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  int64_t size_ = 0;
};

struct Sizes {
  int64_t inner, columns;
  int64_t steps;  ///< tiles that cover inner

  KERNEL_INLINE int64_t steps_from(int64_t block) const { return std::min(kDepthBlock, steps - block); }
};

/// Up to kRowBlock rows of x in tiles [depth block][pair of row tiles][step][2], padded with zeros.
template <typename T>
const std::byte* tiles_of(const T* x, int64_t stride, int64_t rows, const Sizes& s) {
  static thread_local Kept kept;
  const int64_t padded = round_up(rows, kPair);
  std::byte* const tiles = kept.room(padded * s.steps * kRowBytes);
  for (int64_t block = 0; block < s.steps; block += kDepthBlock) {
    const int64_t steps = s.steps_from(block);
    for (int64_t row = 0; row < padded; ++row) {
      std::byte* to =
          tiles + block * padded * kRowBytes + row / kPair * steps * kPairBytes + row % kPair * kRowBytes;
      for (int64_t step = block; step < block + steps; ++step, to += kPairBytes) {
        const int64_t k = step * kDepth<T>;
        const int64_t bytes =
            row < rows ? std::min<int64_t>(kRowBytes, (s.inner - k) * static_cast<int64_t>(sizeof(T))) : 0;
        const __mmask64 there = bytes == kRowBytes ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
        _mm512_store_si512(to, _mm512_maskz_loadu_epi8(there, x + row * stride + k));
      }
    }
  }
  return tiles;
}

template <typename T>
KERNEL_INLINE const T* element_at(const RunMatrix& w, int64_t k, int64_t column) {
  const int64_t along = w.by_columns ? k : column, across = w.by_columns ? column : k;
  return static_cast<const T*>(w.data) + along / kRun<T> * w.run + across * w.stride + along % kRun<T>;
}

/// A tile at the end of w: element by element, padded with zeros.
template <typename T>
void pack_edge(const RunMatrix& w, const Sizes& s, int64_t k, int64_t column, T* to) {
  std::memset(static_cast<void*>(to), 0, kTileBytes);
  for (int64_t i = 0; i < std::min(kDepth<T>, s.inner - k); ++i)
    for (int64_t n = 0; n < std::min(kRows, s.columns - column); ++n)
      to[(i / kGroup<T> * kRows + n) * kGroup<T> + i % kGroup<T>] = *element_at<T>(w, k + i, column + n);
}

/// Byte j of a packed word of bfloat16 (two rows of 16) or int8 (four rows of 16), among the rows' bytes.
template <typename T>
KERNEL_INLINE __m512i interleaving() {
  alignas(64) uint8_t places[64];
  constexpr int64_t kBytes = static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < 64; ++i)
    places[i] = static_cast<uint8_t>(i % 4 / kBytes * kRows * kBytes + i / 4 * kBytes + i % kBytes);
  return _mm512_load_si512(places);
}

KERNEL_INLINE __m512i two_runs(const void* first, const void* second) {
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(first)));
  return _mm512_maskz_inserti64x4(0xff, low, _mm256_loadu_si256(static_cast<const __m256i*>(second)), 1);
}
KERNEL_INLINE __m512i rows_together(const BFloat* from, int64_t stride) {
  return two_runs(from, from + stride);
}
KERNEL_INLINE __m512i rows_together(const int8_t* from, int64_t stride) {
  const auto row = [&](int64_t i) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
  return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), high, 1);
}

/// One panel of 16 columns, `steps` tiles of words [16][16 columns] kPairBytes apart. The panel two behind is
/// fetched meanwhile.
template <typename T>
void pack_panel(const RunMatrix& w, const Sizes& s, int64_t block, int64_t steps, int64_t column,
                std::byte* to) {
  const __m512i places = interleaving<T>();
  const int64_t ahead = element_at<T>(w, 0, column + kPair) - element_at<T>(w, 0, column);
  for (int64_t k = block * kDepth<T>; k < (block + steps) * kDepth<T>; k += kDepth<T>, to += kPairBytes) {
    if (s.inner - k < kDepth<T> || s.columns - column < kRows) {
      pack_edge<T>(w, s, k, column, reinterpret_cast<T*>(to));
      continue;
    }
    const T* from = element_at<T>(w, k, column);
    if (w.by_columns) {
      for (int64_t n = 0; n < kRows; ++n) {
        __builtin_prefetch(from + n * w.stride + ahead);
        if (w.run != kRun<T>) __builtin_prefetch(from + n * w.stride + ahead + w.run);
      }
      constexpr int64_t kBytes = sizeof(T);
      words_of_columns(from, w.stride * kBytes, w.run * kBytes, to);
    } else {
      for (int64_t i = 0; i < kRows; ++i, from += kGroup<T> * w.stride) {
        for (int64_t row = 0; row < kGroup<T>; row += w.stride == kRun<T> ? 2 : 1)
          __builtin_prefetch(from + ahead + row * w.stride);
        _mm512_store_si512(to + i * kRowBytes, _mm512_maskz_permutexvar_epi8(~uint64_t{0}, places,
                                                                             rows_together(from, w.stride)));
      }
    }
  }
}

/// sums [32][32] (+)= a * b for a pair of row tiles, or the first of it, and a pair of panels, `steps` deep.
template <typename T, bool kTwoRows>
KERNEL_INLINE void multiply(const std::byte* a, const std::byte* b, int64_t steps, int32_t* sums,
                            bool accumulate) {
  constexpr size_t kSumBytes = kPair * sizeof(int32_t);
  int32_t* const below = sums + kRows * kPair;
  written();
  if (accumulate) {
    _tile_loadd(0, sums, kSumBytes);
    _tile_loadd(1, sums + kRows, kSumBytes);
    if (kTwoRows) _tile_loadd(2, below, kSumBytes);
    if (kTwoRows) _tile_loadd(3, below + kRows, kSumBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  constexpr bool kBytes = sizeof(T) == 1;
  for (int64_t k = 0; k < steps; ++k, a += kPairBytes, b += kPairBytes) {
    _tile_stream_loadd(6, b, kRowBytes);
    _tile_loadd(4, a, kRowBytes);
    if constexpr (kBytes) _tile_dpbssd(0, 4, 6);
    if constexpr (!kBytes) _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, b + kTileBytes, kRowBytes);
    if constexpr (kBytes) _tile_dpbssd(1, 4, 7);
    if constexpr (!kBytes) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwoRows) {
      _tile_loadd(5, a + kTileBytes, kRowBytes);
      if constexpr (kBytes) _tile_dpbssd(2, 5, 6);
      if constexpr (!kBytes) _tile_dpbf16ps(2, 5, 6);
      if constexpr (kBytes) _tile_dpbssd(3, 5, 7);
      if constexpr (!kBytes) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + kRows, kSumBytes);
  if (kTwoRows) _tile_stored(2, below, kSumBytes);
  if (kTwoRows) _tile_stored(3, below + kRows, kSumBytes);
  written();
}

/// What is multiplied at a time: a block of depth of packed columns with all rows.
struct Block {
  int64_t first, steps;  ///< of depth
  int64_t column, width;
  const std::byte* panels;  ///< [pair of panels][step][2]
  const std::byte* x;       ///< [pair of row tiles][step][2]
};

/// Adds the block's products to the sums [pair of panels][32][32] of up to 32 rows, and finishes those that
/// are whole.
template <typename T, bool kTwoRows, typename Finish>
KERNEL_INLINE void multiply_rows(const Block& b, const Sizes& s, int64_t row, int64_t rows, int32_t* sums,
                                 const Finish& finish) {
  const std::byte* const x = b.x + row / kPair * b.steps * kPairBytes;
  for (int64_t step = 0; step < b.steps; step += kStepBlock) {
    const int64_t steps = std::min(kStepBlock, b.steps - step);
    for (int64_t n = 0; n < b.width; n += kPair) {
      int32_t* const found = sums + n / kPair * kPairSums;
      multiply<T, kTwoRows>(x + step * kPairBytes, b.panels + (n / kPair * b.steps + step) * kPairBytes,
                            steps, found, b.first + step > 0);
      if (b.first + step + steps < s.steps) continue;
      for (int64_t i = 0; i < rows; ++i)
        finish(row + i, b.column + n, found + i * kPair, std::min(kPair, b.width - n));
    }
  }
}

/// Columns [begin, end) of a block of rows. finish(row, column, sums, count): `count` (up to 32) sums of a
/// row.
template <typename T, typename Finish>
void columns_of(const RunMatrix& w, const std::byte* x, int64_t rows, const Sizes& s, int64_t begin,
                int64_t end, const Finish& finish) {
  static thread_local Kept kept_panels, kept_sums;
  const int64_t padded = round_up(rows, kPair), deepest = s.steps_from(0);
  const int64_t most = std::min(kPanelBytes / (deepest * kRowBytes) / kPair * kPair, kSumColumns);
  std::byte* const panels = kept_panels.room(most * deepest * kRowBytes);
  // Sums that one block of depth completes are needed for 32 rows at a time.
  const int64_t row_sums = s.steps > kDepthBlock ? kSumColumns * kPair : 0;
  auto* const sums = reinterpret_cast<int32_t*>(kept_sums.room(
      std::max(padded / kPair * row_sums, most * kPair) * static_cast<int64_t>(sizeof(int32_t))));
  const Tiles tiles(kDepth<BFloat>);
  for (int64_t chunk = begin; chunk < end; chunk += kSumColumns) {
    const int64_t chunk_end = std::min(chunk + kSumColumns, end);
    for (int64_t first = 0; first < s.steps; first += kDepthBlock) {
      Block block{first, s.steps_from(first), chunk, 0, panels, x + first * padded * kRowBytes};
      for (; block.column < chunk_end; block.column += most) {
        block.width = std::min(most, chunk_end - block.column);
        for (int64_t n = 0; n < round_up(block.width, kPair); n += kRows)
          pack_panel<T>(w, s, first, block.steps, block.column + n,
                        panels + n / kPair * block.steps * kPairBytes + n % kPair * kRowBytes);
        int32_t* found = sums + (row_sums > 0 ? (block.column - chunk) * kPair : 0);
        for (int64_t row = 0; row < rows; row += kPair, found += row_sums) {
          const int64_t count = std::min(kPair, rows - row);
          count > kRows ? multiply_rows<T, true>(block, s, row, count, found, finish)
                        : multiply_rows<T, false>(block, s, row, count, found, finish);
        }
      }
    }
  }
}

/// All columns, and kRowBlock rows of x at a time. finish: as above, with rows counted from the first of all.
template <typename T, typename Finish>
void multiplied(const RunMatrix& w, const T* x, int64_t x_row, int64_t rows, int64_t inner, int64_t columns,
                const Finish& finish) {
  const Sizes s{inner, columns, (inner + kDepth<T> - 1) / kDepth<T>};
  for (int64_t first = 0; first < rows; first += kRowBlock) {
    const int64_t count = std::min(kRowBlock, rows - first);
    const std::byte* const tiles = tiles_of(x + first * x_row, x_row, count, s);
    const auto placed = [&](int64_t row, int64_t column, const int32_t* sums, int64_t found) {
      finish(first + row, column, sums, found);
    };
    share_columns(inner, columns, kShareColumns,
                  [&](int64_t begin, int64_t end) { columns_of<T>(w, tiles, count, s, begin, end, placed); });
  }
}

/// Scales up to 32 sums of a row, adds the bias, rounds and stores them.
struct BFloatFinish {
  const Gemv& p;

  KERNEL_INLINE Lanes value(const int32_t* sums, int64_t row, int64_t column, int64_t count) const {
    Lanes found = load(reinterpret_cast<const float*>(sums));
    if (p.alpha != 1.0f) found *= p.alpha;
    if (p.bias != nullptr)
      found += load_at(static_cast<const BFloat*>(p.bias) + row * p.bias_row, column, count) * p.beta;
    return found;
  }
  void operator()(int64_t row, int64_t column, const int32_t* sums, int64_t count) const {
    BFloat* const out = static_cast<BFloat*>(p.out) + row * p.out_row;
    if (count == 2 * kLanes) {
      const Lanes left = value(sums, row, column, kLanes);
      const Lanes right = value(sums + kLanes, row, column + kLanes, kLanes);
      const __m512bh pair = _mm512_cvtne2ps_pbh(bits_as<__m512>(right), bits_as<__m512>(left));
      std::memcpy(static_cast<void*>(out + column), &pair, sizeof(pair));
      return;
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t some = lanes_at(i, count);
      store_at(out, column + i, value(sums + i, row, column + i, some), some);
    }
  }
};

template <typename T>
struct Int8Finish {
  const Int8Product& p;

  void operator()(int64_t row, int64_t column, const int32_t* sums, int64_t count) const {
    for (int64_t i = 0; i < count; i += kLanes)
      finish_row<T>(p, sums + i, row, column + i, lanes_at(i, count));
  }
};

}  // namespace

bool has_panels() { return this_machine() >= InstructionSet::kTiles; }

void panel_product(const Gemv& p, const RunMatrix& w) {
  multiplied(w, static_cast<const BFloat*>(p.x), p.x_row, p.rows, p.inner, p.columns, BFloatFinish{p});
}

void panel_product(const Int8Product& p, const RunMatrix& w) {
  const auto* x = static_cast<const int8_t*>(p.x);
  if (p.type == Type::kHalf)
    return multiplied(w, x, p.inner, p.rows, p.inner, p.columns, Int8Finish<Half>{p});
  if (p.type == Type::kBFloat)
    return multiplied(w, x, p.inner, p.rows, p.inner, p.columns, Int8Finish<BFloat>{p});
  multiplied(w, x, p.inner, p.rows, p.inner, p.columns, Int8Finish<float>{p});
}

#pragma GCC pop_options
#else

bool has_panels() { return false; }
void panel_product(const Gemv&, const RunMatrix&) { throw std::logic_error("no tiles on this machine"); }
void panel_product(const Int8Product&, const RunMatrix&) {
  throw std::logic_error("no tiles on this machine");
}

#endif

}  // namespace host_runtime::kernels
