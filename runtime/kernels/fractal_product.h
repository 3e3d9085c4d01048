// Products of a few rows with a matrix of halves in FRACTAL_NZ, which is read once and where it lies. Sums
// are formed in float and rounded once.
#pragma once

#include <cstddef>

#include "runtime/kernels/dtype.h"

namespace host_runtime::kernels {

constexpr int64_t kFractalWidth = 16;
/// From more rows on, a blocked product of the unpacked matrix wins.
constexpr int64_t kFractalProductRows = 32;

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
  size_t scratch() const { return static_cast<size_t>((rows + 15) / 16 * 16 * scratch_row()); }
};

/// `scratch` has room for product.scratch() floats; product.rows is at most kFractalProductRows.
void fractal_product(const FractalProduct& product, float* scratch);

}  // namespace host_runtime::kernels
