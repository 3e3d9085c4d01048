// Products of rows with a matrix of halves in FRACTAL_NZ, which is read where it lies. Sums are formed in
// float and rounded once.
#pragma once

#include <algorithm>
#include <cstddef>

#include "runtime/kernels/dtype.h"

namespace host_runtime::kernels {

constexpr int64_t kFractalWidth = 16;
/// So many rows of x are widened at a time; for them the matrix is read once.
constexpr int64_t kFractalRowBlock = 128;

/// out = x @ w (+ bias): x [rows, inner], bias [columns] and out [rows, columns] are contiguous. Fractal
/// columns of w lie `block` elements apart and are padded with zeros to whole fractals.
struct FractalProduct {
  Type type;  ///< kHalf or kBFloat
  const void* x;
  const void* w;
  const void* bias;  ///< nullptr: none
  void* out;
  bool by_rows;  ///< w is packed [columns, inner], as the weight of a linear layer; else [inner, columns]
  int64_t rows, inner, columns;
  int64_t block;

  /// Floats between two rows of the widened x: whole fractals, and no power of two, so that rows do not share
  /// cache sets.
  int64_t scratch_row() const { return (inner + 31) / 32 * 32 + 32; }
  /// For whole tiles of 16 rows, which fractal_tiles makes of x.
  size_t scratch() const {
    return static_cast<size_t>((std::min(rows, kFractalRowBlock) + 15) / 16 * 16 * scratch_row());
  }
};

/// `scratch` has room for product.scratch() floats, or for those of the same product with more rows.
void fractal_product(const FractalProduct& product, float* scratch);

}  // namespace host_runtime::kernels
