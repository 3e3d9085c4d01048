#include "runtime/kernels/int8_digits.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "runtime/kernels/fetch.h"
#include "runtime/kernels/isa.h"
#include "runtime/kernels/scalar.h"
#include "runtime/kernels/share.h"

namespace host_runtime::kernels {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni,prefer-vector-width=512")
namespace {

#define KERNEL_LANES 16
// clang-format off: in this order
#include "runtime/kernels/simd.inc"
#include "runtime/kernels/int8_product.inc"
// clang-format on
#undef KERNEL_LANES

/// Of one value of x.
template <typename X>
constexpr int64_t kDigits = kExact<X> ? 1 : 4;
constexpr int64_t kDepth = 64;  // of x and w that one dot product sums over, four to a lane
/// The dot products are of unsigned weights, which are 128 more than the signed ones.
constexpr int8_t kUnsigned = -128;

/// The digits to base 256, from -128 to 127, of kDepth values of x.
template <typename X>
struct alignas(64) DigitBlock {
  int8_t digits[kDigits<X>][kDepth];
};

/// Rows of x as integers times `units`, which of int8 x there are none of. Each begins with a block that
/// holds what the sums of each digit start with, one int32 a lane: -128 times the sum of the digits, for what
/// the weights are too large by.
template <typename X>
struct DigitRows {
  std::vector<DigitBlock<X>> blocks;
  std::vector<float> units;
  int64_t row_blocks = 0;

  const DigitBlock<X>* row(int64_t index) const { return blocks.data() + index * row_blocks; }
};

/// Rows whose sums of a digit stay within an int32 in every lane.
constexpr int64_t kMostBlocks = ((int64_t{1} << 31) - 1) / (4 * 128 * 128);

template <typename T>
KERNEL_INLINE Lanes load_within(const T* x, int64_t at, int64_t size) {
  return at >= size ? Lanes{} : load_at(x, at, lanes_at(at, size));
}

/// Of the magnitudes' bits, which are in the order of the values, with infinity and NaN behind the others.
template <typename T>
int32_t largest_bits(const T* x, int64_t size) {
  __m512i found = _mm512_setzero_si512();
  for (int64_t k = 0; k < size; k += kLanes)
    found = _mm512_maskz_max_epi32(0xffff, found, bits_as<__m512i>(absolute(load_within(x, k, size))));
  const auto lanes = bits_as<IntLanes>(found);
  int32_t most = 0;
  for (int64_t i = 0; i < kLanes; ++i) most = std::max(most, lanes[i]);
  return most;
}

/// The exponents that values of T may lie below their row's largest: what is rounded off them is then hardly
/// more than what T itself rounds off, and less for the types of 16 bits.
template <typename T>
constexpr int32_t kDepthOfExponents = std::is_same_v<T, float>  ? 8
                                      : std::is_same_v<T, Half> ? 14
                                                                : 16;

/// Whether more than an eighth of the values, zeros aside, lie deeper than that.
template <typename T>
bool has_outliers(const T* x, int64_t size, int32_t largest) {
  const int32_t least = largest - (kDepthOfExponents<T> << 23);
  if (least <= 0) return false;
  int64_t deeper = 0;
  for (int64_t k = 0; k < size; k += kLanes) {
    const auto bits = bits_as<__m512i>(absolute(load_within(x, k, size)));
    const __mmask16 there = _mm512_cmpgt_epi32_mask(bits, _mm512_setzero_si512());
    deeper += __builtin_popcount(_mm512_mask_cmplt_epi32_mask(there, bits, _mm512_set1_epi32(least)));
  }
  return deeper > size / 8;
}

KERNEL_INLINE __m512i add_negative(__m512i start, const int8_t* digits) {
  const __m512i sum =
      _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(kUnsigned), _mm512_load_si512(digits));
  return _mm512_sub_epi32(start, sum);
}

KERNEL_INLINE __mmask64 bytes_at(int64_t offset, int64_t size) {
  return size - offset >= kDepth ? ~uint64_t{0} : (uint64_t{1} << (size - offset)) - 1;
}

/// One row of int8, whose values are its digits.
void turn_row(const int8_t* x, int64_t size, DigitBlock<int8_t>* to) {
  __m512i start = _mm512_setzero_si512();
  DigitBlock<int8_t>* block = to + 1;
  for (int64_t k = 0; k < size; k += kDepth, ++block) {
    _mm512_store_si512(block->digits, _mm512_maskz_loadu_epi8(bytes_at(k, size), x + k));
    start = add_negative(start, block->digits[0]);
  }
  _mm512_store_si512(to->digits, start);
}

/// One row of floats; false where its values cannot be scaled to integers.
template <typename T>
bool turn_row(const T* x, int64_t size, DigitBlock<T>* to, float* unit) {
  const int32_t bits = largest_bits(x, size);
  // With the exponent e the largest value is below 2^(e - 126), and times 2^(156 - e) below 2^30.
  const int32_t exponent = bits == 0 ? 127 : bits >> 23;
  if (exponent < 30 || exponent == 255) return false;
  if (has_outliers(x, size, bits)) return false;
  *unit = same_bits<float>((exponent - 29) << 23);
  const Lanes factor = splat(same_bits<float>((283 - exponent) << 23));
  // Added to an integer, this makes each of its bytes a balanced digit plus 128.
  const auto offset = _mm512_set1_epi32(static_cast<int32_t>(0x80808080u));
  __m512i starts[kDigits<T>] = {};
  DigitBlock<T>* block = to + 1;
  for (int64_t k = 0; k < size; k += kDepth, ++block) {
    for (int64_t i = 0; i < kDepth; i += kLanes) {
      const Lanes scaled = load_within(x, k + i, size) * factor;
      const __m512i integers = _mm512_maskz_cvtps_epi32(0xffff, bits_as<__m512>(scaled));
      const auto digits = bits_as<WordLanes>(_mm512_xor_si512(_mm512_add_epi32(integers, offset), offset));
      for (int64_t d = 0; d < kDigits<T>; ++d) {
        const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, bits_as<__m512i>(digits >> (8 * d)));
        std::memcpy(block->digits[d] + i, &bytes, sizeof(bytes));
      }
    }
    for (int64_t d = 0; d < kDigits<T>; ++d) starts[d] = add_negative(starts[d], block->digits[d]);
  }
  for (int64_t d = 0; d < kDigits<T>; ++d) _mm512_store_si512(to->digits[d], starts[d]);
  return true;
}

template <typename X>
bool turn_rows(const Int8Product& p, DigitRows<X>& rows) {
  rows.row_blocks = 1 + (p.inner + kDepth - 1) / kDepth;
  const auto blocks = static_cast<size_t>(p.rows * rows.row_blocks), count = static_cast<size_t>(p.rows);
  if (rows.blocks.size() < blocks) rows.blocks.resize(blocks);
  if (rows.units.size() < count) rows.units.resize(count);
  const X* x = static_cast<const X*>(p.x);
  DigitBlock<X>* to = rows.blocks.data();
  for (size_t m = 0; m < count; ++m, x += p.inner, to += rows.row_blocks) {
    if constexpr (kExact<X>) {
      turn_row(x, p.inner, to);
    } else {
      if (!turn_row(x, p.inner, to, &rows.units[m])) return false;
    }
  }
  return true;
}

/// Where the weights lie that come behind kColumns columns. Columns without gaps are fetched in the order of
/// their addresses, in which memory gives most.
template <int64_t kColumns>
class Behind {
 public:
  Behind(const Int8Product& p, const int8_t* w) {
    const bool linear = p.w_stride == p.inner;
    near_ = w + (linear ? kNear : kColumns * p.w_stride);
    far_ = w + (linear ? kFar : 2 * kColumns * p.w_stride);
    along_ = linear ? kColumns : 1;
    apart_ = linear ? kLineBytes : p.w_stride;
  }

  KERNEL_INLINE void fetch(int64_t k) const {
    for (int64_t j = 0; j < kColumns; ++j) {
      __builtin_prefetch(near_ + k * along_ + j * apart_, 0, 3);
      __builtin_prefetch(far_ + k * along_ + j * apart_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kNear = 1024, kFar = 8192;
  const int8_t* near_;
  const int8_t* far_;
  int64_t along_, apart_;
};

/// The digits' sums in each lane, put together.
template <typename X>
KERNEL_INLINE SumLanes<X> whole_sum(const __m512i (&digits)[kDigits<X>]) {
  if constexpr (kExact<X>) {
    return bits_as<IntLanes>(digits[0]);
  } else {
    Lanes sum{};
    for (int64_t d = kDigits<X> - 1; d >= 0; --d)
      sum = sum * splat(256.0f) + __builtin_convertvector(bits_as<IntLanes>(digits[d]), Lanes);
    return sum;
  }
}

/// kRows rows times kColumns columns: what each lane has of a sum, to found [kRows][kLanes].
template <int64_t kRows, int64_t kColumns, bool kFetch, typename X>
KERNEL_INLINE void add_columns(const Int8Product& p, const DigitBlock<X>* x, int64_t row_blocks,
                               const int8_t* w, SumLanes<X>* found) {
  __m512i totals[kRows][kColumns][kDigits<X>];
  for (int64_t m = 0; m < kRows; ++m)
    for (int64_t j = 0; j < kColumns; ++j)
      for (int64_t d = 0; d < kDigits<X>; ++d)
        totals[m][j][d] = _mm512_load_si512(x[m * row_blocks].digits[d]);
  const __m512i flip = _mm512_set1_epi8(kUnsigned);
  const Behind<kColumns> behind(p, w);
  const DigitBlock<X>* block = x + 1;
  for (int64_t k = 0; k < p.inner; k += kDepth, ++block) {
    if (kFetch) behind.fetch(k);
    const __mmask64 there = bytes_at(k, p.inner);
    __m512i weights[kColumns];
    for (int64_t j = 0; j < kColumns; ++j)
      weights[j] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, w + j * p.w_stride + k), flip);
    for (int64_t m = 0; m < kRows; ++m)
      for (int64_t d = 0; d < kDigits<X>; ++d) {
        const __m512i digits = _mm512_load_si512(block[m * row_blocks].digits[d]);
        for (int64_t j = 0; j < kColumns; ++j)
          totals[m][j][d] = _mm512_dpbusd_epi32(totals[m][j][d], weights[j], digits);
      }
  }
  for (int64_t m = 0; m < kRows; ++m)
    for (int64_t j = 0; j < kColumns; ++j) found[m * kLanes + j] = whole_sum<X>(totals[m][j]);
}

/// Up to kLanes columns of kRows rows.
template <int64_t kRows, int64_t kColumns, bool kFetch, typename X, typename T>
KERNEL_INLINE void digit_columns(const Int8Product& p, const DigitRows<X>& rows, int64_t row, int64_t column,
                                 int64_t count) {
  SumLanes<X> found[kRows][kLanes] = {};
  const DigitBlock<X>* x = rows.row(row);
  const int8_t* w = p.w + column * p.w_stride;
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns)
    add_columns<kRows, kColumns, kFetch>(p, x, rows.row_blocks, w + j * p.w_stride, found[0] + j);
  for (; j < count; ++j)
    add_columns<kRows, 1, kFetch>(p, x, rows.row_blocks, w + j * p.w_stride, found[0] + j);
  for (int64_t m = 0; m < kRows; ++m) {
    if constexpr (kExact<X>) {
      int32_t results[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) results[i] = lane_sum(found[m][i]);
      finish_row<T>(p, results, row + m, column, count);
    } else {
      float results[kLanes];
      store(results, sums(found[m]) * splat(rows.units[static_cast<size_t>(row + m)]));
      finish_row<T>(p, results, row + m, column, count);
    }
  }
}

/// As many rows at a time as the registers hold the sums of.
template <typename X>
constexpr int64_t kRowTile = kExact<X> ? 4 : 2;

/// `rows_taken` rows, at most kRowTile, which meet the weights first if kFetch.
template <bool kFetch, typename X, typename T>
KERNEL_INLINE void row_tile(const Int8Product& p, const DigitRows<X>& rows, int64_t row, int64_t rows_taken,
                            int64_t column, int64_t count) {
  if constexpr (kExact<X>) {
    if (rows_taken == 4) return digit_columns<4, 4, kFetch, X, T>(p, rows, row, column, count);
    if (rows_taken == 3) return digit_columns<3, 4, kFetch, X, T>(p, rows, row, column, count);
    if (rows_taken == 2) return digit_columns<2, 4, kFetch, X, T>(p, rows, row, column, count);
    return digit_columns<1, 4, kFetch, X, T>(p, rows, row, column, count);
  } else {
    if (rows_taken == 2) return digit_columns<2, 2, kFetch, X, T>(p, rows, row, column, count);
    return digit_columns<1, 1, kFetch, X, T>(p, rows, row, column, count);
  }
}

/// Columns [begin, end) of every row; the weights of kLanes columns stay in the cache while every row uses
/// them.
template <typename X, typename T>
void digit_product(const Int8Product& p, const DigitRows<X>& rows, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; column += kLanes) {
    const int64_t count = lanes_at(column, end);
    row_tile<true, X, T>(p, rows, 0, std::min(kRowTile<X>, p.rows), column, count);
    for (int64_t row = kRowTile<X>; row < p.rows; row += kRowTile<X>)
      row_tile<false, X, T>(p, rows, row, std::min(kRowTile<X>, p.rows - row), column, count);
  }
}

/// From more rows of floats on, sums of floats keep pace: a weight made a float is used by four rows.
constexpr int64_t kMostFloatRows = 3;

template <typename X, typename T>
bool shared_product(const Int8Product& p) {
  static thread_local DigitRows<X> kept;  // as every product of a step needs some
  DigitRows<X>& rows = kept;
  if (!turn_rows(p, rows)) return false;
  share_columns(p.inner, p.columns, kInt8ColumnBlock,
                [&](int64_t begin, int64_t end) { digit_product<X, T>(p, rows, begin, end); });
  return true;
}

}  // namespace

bool int8_digits(const Int8Product& p) {
  if ((!p.int8_x && p.rows > kMostFloatRows) || p.inner > kMostBlocks * kDepth ||
      this_machine() < InstructionSet::kAvx512Dots)
    return false;
  return visit(p.type, [&](auto zero) {
    using T = decltype(zero);
    return p.int8_x ? shared_product<int8_t, T>(p) : shared_product<T, T>(p);
  });
}

#pragma GCC pop_options
#else

bool int8_digits(const Int8Product&) { return false; }

#endif

}  // namespace host_runtime::kernels
