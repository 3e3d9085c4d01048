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
void index_put(at::Tensor& self, const std::vector<at::Tensor>& indices, const at::Tensor& values,
               bool accumulate);
/// `indices` [..., k] name positions in the first k dimensions of `self`.
void scatter_nd_update(at::Tensor& self, const at::Tensor& indices, const at::Tensor& updates);
/// reduction: 0 replaces, 1 adds, 2 multiplies.
void scatter(at::Tensor& self, int64_t dim, const at::Tensor& index, const at::Tensor& source,
             int64_t reduction);
void scatter(at::Tensor& self, int64_t dim, const at::Tensor& index, const at::Scalar& value,
             int64_t reduction);
c10::string_view scatter_reduction(int64_t code);
/// Counts of repeat_interleave, which ATen wants as int32 or int64 in one dimension.
at::Tensor counts(const at::Tensor& repeats);
/// Copies `self` into `out`, unless they share memory already, and returns `out`.
at::Tensor& after_copy(const at::Tensor& self, at::Tensor& out);

void copy_pair(const std::tuple<at::Tensor, at::Tensor>& results, at::Tensor& first, at::Tensor& second);
/// Undefined tensors on either side are skipped.
void copy_three(const std::tuple<at::Tensor, at::Tensor, at::Tensor>& results, at::Tensor& first,
                at::Tensor& second, at::Tensor& third);
/// Values, inverse and counts; absent results have no elements and are skipped.
void unique(const std::tuple<at::Tensor, at::Tensor, at::Tensor>& results, Tensor& values, Tensor& inverse,
            Tensor* counts);
void layer_norm(const at::Tensor& input, at::IntArrayRef shape, const std::optional<at::Tensor>& weight,
                const std::optional<at::Tensor>& bias, double eps, at::Tensor& out, at::Tensor& mean,
                at::Tensor& rstd);

/// Products whose result may have another dtype than the operands (bf16 operands with a fp32 result).
void matmul_out(at::Tensor& out, const at::Tensor& self, const at::Tensor& other);
/// aclnnTransposeBatchMatMul: see prepared::transpose_matmul.
void transpose_matmul_out(at::Tensor& out, const at::Tensor& x1, const at::Tensor& x2,
                          at::IntArrayRef perm_x1, at::IntArrayRef perm_x2, int64_t batch_split);
void addmm_out(at::Tensor& out, const at::Tensor& self, const at::Tensor& mat1, const at::Tensor& mat2,
               const at::Scalar& beta, const at::Scalar& alpha);

}  // namespace helper

}  // namespace aclnn
