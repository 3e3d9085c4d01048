// Products of a few rows with a matrix of int8, whose columns are contiguous (the weight of a linear layer).
// It is read once and where it lies.
#pragma once

#include "runtime/kernels/quant_rows.h"

namespace host_runtime::kernels {

/// From more rows on, ATen's blocked products win.
constexpr int64_t kInt8ProductRows = 32;
/// Columns at whose multiples threads take over: whole blocks of the kernels.
constexpr int64_t kInt8ColumnBlock = 128;

/// out = x @ w * scale * row_scale + bias. Of int8 x the sums are exact, and an int32 bias is added to them;
/// else they are formed in float, or more exactly (int8_digits.h). x [rows, inner] and out [rows, columns]
/// are contiguous.
struct Int8Product {
  Type type;    ///< of out; of x, unless it is int8
  bool int8_x;  ///< x is int8
  const void* x;
  const int8_t* w;
  void* out;
  QuantParameter scale;    ///< one or one a column
  QuantParameter bias;     ///< one a column; without data: none
  const float* row_scale;  ///< one a row; nullptr: none
  int64_t rows, inner, columns;
  int64_t w_stride;  ///< between columns of w
};

/// Threads share the columns (share.h); every result is formed by one of them, in one order.
void int8_product(const Int8Product& product);

}  // namespace host_runtime::kernels
