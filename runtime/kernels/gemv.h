// Matrix products with few rows, as decode steps have them: each weight is read once, from memory in
// whichever layout it has (rows, columns, FRACTAL_NZ), without repacking.
#pragma once

#include "runtime/aclnn/tensor.h"

namespace aclnn::kernels {

/// out = x @ weight (+ bias): x [..., K] contiguous with at most 8 rows in all, weight [K, N] with either
/// dimension contiguous or in FRACTAL_NZ, bias [N] or null, out [..., N] contiguous; all fp32 or all bf16,
/// sums in fp32. Declines anything else.
Work small_matmul(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& out);
/// The same for aclnnAddmm: beta and alpha must be 1 and `self` a row.
Work small_addmm(const Tensor& self, const Tensor& x, const Tensor& weight, const c10::Scalar& beta,
                 const c10::Scalar& alpha, const Tensor& out);

}  // namespace aclnn::kernels
