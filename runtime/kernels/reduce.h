// Prepared reductions over the last dimension of contiguous fp32 and bf16 tensors.
#pragma once

#include "runtime/aclnn/tensor.h"

namespace aclnn::kernels {

/// Sum over the last dimension, times `scale` (1/n for a mean); accumulated in fp32.
Work sum_last(const Tensor& x, c10::ArrayRef<int64_t> dims, const Tensor& out, bool mean);
/// Position of the largest element of each row (the first of equals; NaN counts as largest), as int64 or
/// int32.
Work argmax_last(const Tensor& x, int64_t dim, const Tensor& out);
Work softmax_last(const Tensor& x, int64_t dim, const Tensor& out);

}  // namespace aclnn::kernels
