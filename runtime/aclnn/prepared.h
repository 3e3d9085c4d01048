// Prepared forms of the plain operators, for the `=>` column of the tables: dtypes, strides and the kernel
// are chosen in phase 1, so that a replay runs the kernel and nothing else. Each function returns an empty
// Work for arguments without a kernel; the definition's ATen body then runs.
#pragma once

#include <ATen/core/ATen_fwd.h>

#include <optional>
#include <vector>

#include "runtime/aclnn/operator.h"
#include "runtime/kernels/discrete.h"
#include "runtime/kernels/pointwise.h"

namespace aclnn::prepared {

using host_runtime::kernels::Arithmetic;
using host_runtime::kernels::Comparison;
using host_runtime::kernels::Function;
using host_runtime::kernels::Logic;

// Elementwise. Operands broadcast to `out`; float32, float16, bfloat16 of one dtype, or int32 and int64.

/// self + alpha * other (negate: minus), any dtype of the above.
Work add(const Tensor& self, const Tensor& other, const at::Scalar& alpha, const Tensor& out);
Work sub(const Tensor& self, const Tensor& other, const at::Scalar& alpha, const Tensor& out);
Work add(const Tensor& self, const at::Scalar& other, const at::Scalar& alpha, const Tensor& out);
Work sub(const Tensor& self, const at::Scalar& other, const at::Scalar& alpha, const Tensor& out);
Work mul(const Tensor& self, const Tensor& other, const Tensor& out);
Work mul(const Tensor& self, const at::Scalar& other, const Tensor& out);
/// True division, of floats.
Work div(const Tensor& self, const Tensor& other, const Tensor& out);
Work div(const Tensor& self, const at::Scalar& other, const Tensor& out);
Work maximum(const Tensor& self, const Tensor& other, const Tensor& out);
Work minimum(const Tensor& self, const Tensor& other, const Tensor& out);
/// One-operand functions of floats.
Work unary(Function function, const Tensor& self, const Tensor& out);
/// Exponents 2, 3, 0.5, -0.5, -1 of floats.
Work pow(const Tensor& self, const at::Scalar& exponent, const Tensor& out);
/// bool results; also of bool operands.
Work compare(Comparison comparison, const Tensor& self, const Tensor& other, const Tensor& out);
Work compare(Comparison comparison, const Tensor& self, const at::Scalar& other, const Tensor& out);
/// bool operands and results.
Work logic(Logic logic, const Tensor& self, const Tensor& other, const Tensor& out);
Work logical_not(const Tensor& self, const Tensor& out);
/// condition ? self : other.
Work where(const Tensor& condition, const Tensor& self, const Tensor& other, const Tensor& out);
Work masked_fill(const Tensor& self, const Tensor& mask, const Tensor& value);
Work masked_fill(const Tensor& self, const Tensor& mask, const at::Scalar& value);

// Moving.

/// Copies with conversion; `source` broadcasts.
Work copy(const Tensor& self, const Tensor& source);
Work fill(const Tensor& self, const at::Scalar& value);
Work cat(const TensorList& tensors, int64_t dim, const Tensor& out);
/// Rows of `self` along `dim`. int32 and int64 indices of one dimension at most.
Work index_select(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& out);
Work embedding(const Tensor& weight, const Tensor& indices, const Tensor& out);
/// Indexing with one index tensor; the others are empty (op-plugin's way to say `:`).
Work index(const Tensor& self, const TensorList& indices, const Tensor& out);
/// self[.., indices[k], ..] = values, one index tensor, no accumulation.
Work index_put(const Tensor& self, const TensorList& indices, const Tensor& values, bool accumulate);
Work index_copy(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source);
/// reduction 0 (replace) only. The index has the shape of the source.
Work scatter(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source, int64_t reduction);
Work gather(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& out);

// Over the last dimensions, which have to be contiguous; floats.

Work sum(const Tensor& self, at::IntArrayRef dims, const Tensor& out);
Work mean(const Tensor& self, at::IntArrayRef dims, const Tensor& out);
Work amax(const Tensor& self, at::IntArrayRef dims, const Tensor& out);
Work amin(const Tensor& self, at::IntArrayRef dims, const Tensor& out);
/// The first of equal elements; NaN counts as the largest.
Work argmax(const Tensor& self, int64_t dim, const Tensor& out);
Work max_dim(const Tensor& self, int64_t dim, const Tensor& out, const Tensor& indices);
Work softmax(const Tensor& self, int64_t dim, const Tensor& out);

// Products with few rows on the left (decode steps), and with a weight that tiles or FRACTAL_NZ's kernels
// read; the others are ATen's.

/// self [.., M, K] @ mat2 [.., K, N]; batch dimensions equal, of self and out mergeable. mat2 may be in
/// FRACTAL_NZ.
Work matmul(const Tensor& self, const Tensor& mat2, const Tensor& out);
/// Groups of rows, each times its own matrix [K, N] in FRACTAL_NZ; what reads plain rows is left to ATen.
struct PackedGroups {
  const TensorList& x;
  const TensorList& weight;
  const Tensor* list;                     ///< ends of the groups (list_type 0) or their sizes (1)
  std::vector<const TensorList*> others;  ///< bias and scales: taken where all are absent
  int64_t group_type, list_type, act_type;
  const TensorList& out;
};
Work grouped_matmul_nz(const Call& call, const PackedGroups& arguments);
struct TransposeMatmul {
  const Tensor* x1;
  const Tensor* x2;
  at::IntArrayRef perm_x1, perm_x2, perm_y;
  int64_t batch_split;
  const Tensor* out;
};
/// aclnnTransposeBatchMatMul: x1 and x2 in the order of their permutations, [B, M, K] @ [B, K, N], to out [M,
/// B, N] (or [batch_split, M, B / batch_split * N]). Refuses what the document forbids.
Work transpose_matmul(const Call& call, const TransposeMatmul& arguments);
Work addmm(const Tensor& self, const Tensor& mat1, const Tensor& mat2, const at::Scalar& beta,
           const at::Scalar& alpha, const Tensor& out);

}  // namespace aclnn::prepared
