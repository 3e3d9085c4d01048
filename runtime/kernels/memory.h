// Filling and copying device memory.
#pragma once

#include "runtime/aclnn/tensor.h"

namespace aclnn::kernels {

/// Zeroes a contiguous tensor.
Work zero(const Tensor& self);

}  // namespace aclnn::kernels
