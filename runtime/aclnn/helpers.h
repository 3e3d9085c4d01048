// What definitions in the tables call besides ATen.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "runtime/aclnn/tensor.h"

namespace aclnn {

/// A scalar argument as ATen's "wrapped number": it takes part in the computation without deciding the dtype.
at::Tensor wrapped(const at::Scalar& value);
/// aclnnDivMod's mode: 0 true division, 1 truncate, 2 floor.
std::optional<c10::string_view> rounding(int32_t mode);

/// Writes a result whose shape is known only now, and tells aclGetViewShape. `out` has room for the largest
/// result.
void write_dynamic(Tensor& out, const at::Tensor& result);

namespace helper {

void one_hot(const at::Tensor& self, int64_t classes, const at::Tensor& on, const at::Tensor& off,
             int64_t axis, at::Tensor& out);
/// Advanced indexing. op-plugin sends dimensions that are not indexed as tensors of no elements.
void index_out(at::Tensor& out, const at::Tensor& self, const std::vector<at::Tensor>& indices);
void embedding_out(at::Tensor& out, const at::Tensor& weight, const at::Tensor& indices);
void max_dim(const at::Tensor& self, int64_t dim, bool keepdim, at::Tensor& out, at::Tensor& indices);
void min_dim(const at::Tensor& self, int64_t dim, bool keepdim, at::Tensor& out, at::Tensor& indices);

/// Products whose result may have another dtype than the operands (bf16 operands with a fp32 result).
void matmul_out(at::Tensor& out, const at::Tensor& self, const at::Tensor& other);
void addmm_out(at::Tensor& out, const at::Tensor& self, const at::Tensor& mat1, const at::Tensor& mat2,
               const at::Scalar& beta, const at::Scalar& alpha);

}  // namespace helper

}  // namespace aclnn
