// Products of any number of rows by AMX, of bfloat16 or int8: the matrix is packed into panels of 16 columns,
// a block at a time, from plain order or from FRACTAL_NZ. Nothing but that block is ever laid out anew.
#pragma once

#include "runtime/kernels/int8_product.h"
#include "runtime/kernels/row_product.h"

namespace host_runtime::kernels {

/// A matrix [inner, columns] as runs of 32 bytes, which is a fractal's width; in plain order one lies behind
/// the other.
struct RunMatrix {
  const void* data;
  bool by_columns;  ///< a run is a part of a column (the weight of a linear layer), else of a row
  int64_t stride;   ///< elements between neighbouring columns (by_columns) or rows
  int64_t run;      ///< elements between a run and the next one of its column or row
};

/// Whether this machine multiplies panels.
bool has_panels();

/// x @ w * alpha + bias * beta of bfloat16, as gemv_kernel computes it from one batch (product.w is not
/// read): sums in float, rounded once; numbers below 2^-126 count as zeros. Threads share
/// the columns (share.h); every result is formed by one of them, in one order.
void panel_product(const Gemv& product, const RunMatrix& w);

/// The same of an int8 x, as int8_product computes it (product.w is not read): sums are exact.
void panel_product(const Int8Product& product, const RunMatrix& w);

}  // namespace host_runtime::kernels
