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

constexpr int64_t kDigits = 4;
constexpr int64_t kDepth = 64;  // of x and w that one dot product sums over, four to a lane
/// The dot products are of unsigned weights, which are 128 more than the signed ones.
constexpr int8_t kUnsigned = -128;

/// The digits to base 256, from -128 to 127, of kDepth values of x.
struct alignas(64) DigitBlock {
  int8_t digits[kDigits][kDepth];
};

/// Rows of x as integers times `unit`. Each begins with a block that holds what the sums of each digit start
/// with, one int32 a lane: -128 times the sum of the digits, for what the weights are too large by.
struct DigitRows {
  std::vector<DigitBlock> blocks;
  std::vector<float> units;
  int64_t row_blocks = 0;

  const DigitBlock* row(int64_t index) const { return blocks.data() + index * row_blocks; }
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

/// One row; false where its values cannot be scaled to integers.
template <typename T>
bool turn_row(const T* x, int64_t size, DigitBlock* to, float* unit) {
  const int32_t bits = largest_bits(x, size);
  // With the exponent e the largest value is below 2^(e - 126), and times 2^(156 - e) below 2^30.
  const int32_t exponent = bits == 0 ? 127 : bits >> 23;
  if (exponent < 30 || exponent == 255) return false;
  *unit = same_bits<float>((exponent - 29) << 23);
  const Lanes factor = splat(same_bits<float>((283 - exponent) << 23));
  // Added to an integer, this makes each of its bytes a balanced digit plus 128.
  const auto offset = _mm512_set1_epi32(static_cast<int32_t>(0x80808080u));
  __m512i sums[kDigits] = {};
  DigitBlock* block = to + 1;
  for (int64_t k = 0; k < size; k += kDepth, ++block) {
    for (int64_t i = 0; i < kDepth; i += kLanes) {
      const Lanes scaled = load_within(x, k + i, size) * factor;
      const __m512i integers = _mm512_maskz_cvtps_epi32(0xffff, bits_as<__m512>(scaled));
      const auto digits = bits_as<WordLanes>(_mm512_xor_si512(_mm512_add_epi32(integers, offset), offset));
      for (int64_t d = 0; d < kDigits; ++d) {
        const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, bits_as<__m512i>(digits >> (8 * d)));
        std::memcpy(block->digits[d] + i, &bytes, sizeof(bytes));
      }
    }
    for (int64_t d = 0; d < kDigits; ++d)
      sums[d] =
          _mm512_dpbusd_epi32(sums[d], _mm512_set1_epi8(kUnsigned), _mm512_load_si512(block->digits[d]));
  }
  for (int64_t d = 0; d < kDigits; ++d)
    _mm512_store_si512(to->digits[d], _mm512_sub_epi32(_mm512_setzero_si512(), sums[d]));
  return true;
}

template <typename T>
bool turn_rows(const Int8Product& p, DigitRows& rows) {
  rows.row_blocks = 1 + (p.inner + kDepth - 1) / kDepth;
  const auto blocks = static_cast<size_t>(p.rows * rows.row_blocks), count = static_cast<size_t>(p.rows);
  if (rows.blocks.size() < blocks) rows.blocks.resize(blocks);
  if (rows.units.size() < count) rows.units.resize(count);
  const T* x = static_cast<const T*>(p.x);
  for (int64_t m = 0; m < p.rows; ++m)
    if (!turn_row(x + m * p.inner, p.inner, rows.blocks.data() + m * rows.row_blocks, &rows.units[m]))
      return false;
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

/// kRows rows times kColumns columns: what each lane has of a sum, to found [kRows][kLanes].
template <int64_t kRows, int64_t kColumns, bool kFetch>
KERNEL_INLINE void add_columns(const Int8Product& p, const DigitBlock* x, int64_t row_blocks, const int8_t* w,
                               Lanes* found) {
  __m512i totals[kRows][kColumns][kDigits];
  for (int64_t m = 0; m < kRows; ++m)
    for (int64_t j = 0; j < kColumns; ++j)
      for (int64_t d = 0; d < kDigits; ++d) totals[m][j][d] = _mm512_load_si512(x[m * row_blocks].digits[d]);
  const __m512i flip = _mm512_set1_epi8(kUnsigned);
  const Behind<kColumns> behind(p, w);
  const DigitBlock* block = x + 1;
  for (int64_t k = 0; k < p.inner; k += kDepth, ++block) {
    if (kFetch) behind.fetch(k);
    const int64_t left = p.inner - k;
    const __mmask64 there = left >= kDepth ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
    __m512i weights[kColumns];
    for (int64_t j = 0; j < kColumns; ++j)
      weights[j] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, w + j * p.w_stride + k), flip);
    for (int64_t m = 0; m < kRows; ++m)
      for (int64_t d = 0; d < kDigits; ++d) {
        const __m512i digits = _mm512_load_si512(block[m * row_blocks].digits[d]);
        for (int64_t j = 0; j < kColumns; ++j)
          totals[m][j][d] = _mm512_dpbusd_epi32(totals[m][j][d], weights[j], digits);
      }
  }
  for (int64_t m = 0; m < kRows; ++m)
    for (int64_t j = 0; j < kColumns; ++j) {
      Lanes sum{};
      for (int64_t d = kDigits - 1; d >= 0; --d)
        sum = sum * splat(256.0f) + __builtin_convertvector(bits_as<IntLanes>(totals[m][j][d]), Lanes);
      found[m * kLanes + j] = sum;
    }
}

/// Up to kLanes columns of kRows rows.
template <int64_t kRows, int64_t kColumns, bool kFetch, typename T>
KERNEL_INLINE void digit_columns(const Int8Product& p, const DigitRows& rows, int64_t row, int64_t column,
                                 int64_t count) {
  Lanes found[kRows][kLanes] = {};
  const DigitBlock* x = rows.row(row);
  const int8_t* w = p.w + column * p.w_stride;
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns)
    add_columns<kRows, kColumns, kFetch>(p, x, rows.row_blocks, w + j * p.w_stride, found[0] + j);
  for (; j < count; ++j)
    add_columns<kRows, 1, kFetch>(p, x, rows.row_blocks, w + j * p.w_stride, found[0] + j);
  for (int64_t m = 0; m < kRows; ++m) {
    float results[kLanes];
    store(results, sums(found[m]) * splat(rows.units[static_cast<size_t>(row + m)]));
    finish_row<T>(p, results, row + m, column, count);
  }
}

template <typename T>
void digit_product(const Int8Product& p, const DigitRows& rows, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; column += kLanes) {
    const int64_t count = lanes_at(column, end);
    if (p.rows == 1) {
      digit_columns<1, 1, true, T>(p, rows, 0, column, count);
      continue;
    }
    digit_columns<2, 2, true, T>(p, rows, 0, column, count);
    if (p.rows == 3) digit_columns<1, 1, false, T>(p, rows, 2, column, count);
  }
}

/// From more rows on, sums of floats keep pace: a weight made a float is used by four rows.
constexpr int64_t kMostRows = 3;

template <typename T>
bool shared_product(const Int8Product& p) {
  static thread_local DigitRows kept;  // as every product of a step needs some
  DigitRows& rows = kept;
  if (!turn_rows<T>(p, rows)) return false;
  share_columns(p.inner, p.columns, kInt8ColumnBlock,
                [&](int64_t begin, int64_t end) { digit_product<T>(p, rows, begin, end); });
  return true;
}

}  // namespace

bool int8_digits(const Int8Product& p) {
  if (p.int8_x || p.rows > kMostRows || p.inner > kMostBlocks * kDepth ||
      this_machine() < InstructionSet::kAvx512Dots)
    return false;
  return visit(p.type, [&](auto zero) { return shared_product<decltype(zero)>(p); });
}

#pragma GCC pop_options
#else

bool int8_digits(const Int8Product&) { return false; }

#endif

}  // namespace host_runtime::kernels
