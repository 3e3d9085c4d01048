// FRACTAL_NZ, physically. The last two dimensions [M, N] are cut into fractals of 16 rows by C0 columns,
// where C0 elements are 32 bytes; fractals lie column by column, so storage is [..., ceil(N/C0), ceil(M/16),
// 16, C0] with zeros as padding.
#pragma once

#include <ATen/ATen.h>

#include "runtime/aclnn/tensor.h"

namespace aclnn {

constexpr int64_t kFractalRows = 16;

/// Storage shape of an ND shape (at least two dimensions) in FRACTAL_NZ with fractals of `columns` columns.
Dims nz_storage_shape(c10::ArrayRef<int64_t> shape, int64_t columns);

/// Where a view of an NZ tensor's rows and columns lie: the ND matrix that was packed, and whether the view
/// is its transpose. Throws std::runtime_error for views that are neither (a slice of packed storage has no
/// meaning).
struct NzView {
  int64_t batch;
  int64_t rows;     // M of the packed matrix
  int64_t columns;  // N of the packed matrix
  int64_t row_blocks;
  int64_t column_blocks;
  int64_t fractal_columns;  // C0
  bool transposed;
};
NzView nz_view(const Tensor& tensor);

/// A new ND tensor with the values of a tensor in a private format, in the view's shape.
at::Tensor unpack(const Tensor& tensor);

/// Writes ND values of the view's shape into a tensor in a private format, padding with zeros.
void pack(const at::Tensor& values, const Tensor& tensor);

}  // namespace aclnn
