// Products of a few rows with a matrix: out = x @ w (+ bias), accumulated in float, rounded once.
#pragma once

#include "runtime/kernels/dtype.h"

namespace host_runtime::kernels {

/// Strides count elements; x, out and bias are contiguous in their last dimension.
struct Gemv {
  const void* x;  ///< rows of `inner` elements
  const void* w;
  void* out;
  const void* bias;  ///< `columns` elements a row, or nullptr
  int64_t batches;
  int64_t rows;
  int64_t inner;
  int64_t columns;
  int64_t x_batch, x_row;
  int64_t w_batch;
  int64_t w_stride;  ///< between rows of w (plain) or between its columns (transposed)
  int64_t out_batch, out_row;
  int64_t bias_row;     ///< 0: one bias for all rows
  float alpha;          ///< of the product
  float beta;           ///< of the bias
  bool cached = false;  ///< w is taken to lie in a cache of the processor
};
/// `transposed`: each column of w is contiguous (the weight of a linear layer), else each row is. Threads
/// share the columns (share.h); every result is formed by one of them, in one order.
using GemvKernel = void (*)(const Gemv&);
GemvKernel gemv_kernel(Type type, bool transposed);

/// From more rows on, ATen's blocked products win.
int64_t gemv_rows(Type type, bool transposed);

}  // namespace host_runtime::kernels
