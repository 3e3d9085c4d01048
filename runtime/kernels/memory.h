// Filling, copying, casting and gathering device memory.
#pragma once

#include "runtime/aclnn/tensor.h"

namespace aclnn::kernels {

/// Zeroes a contiguous tensor.
Work zero(const Tensor& self);
/// Fills a contiguous tensor.
Work fill(const Tensor& self, const c10::Scalar& value);
/// to = from, of one shape, with a cast between fp32, bf16, int32 and int64, or of one dtype.
Work copy(const Tensor& to, const Tensor& from);
/// Joins contiguous tensors of one dtype.
Work cat(const TensorList& tensors, int64_t dim, const Tensor& out);
/// out[i, :] = table[index[i], :]; contiguous, index int32 or int64. An index out of range fails the task.
Work gather_rows(const Tensor& table, const Tensor& index, const Tensor& out);

}  // namespace aclnn::kernels
