#include <ATen/core/ATen_fwd.h>

#include "runtime/aclnn/prepared.h"
#include "runtime/aclnn/prepared_support.h"
#include "runtime/kernels/fold.h"

namespace aclnn::prepared {
namespace {

using kernels::Fold;

/// How many of the last dimensions `dims` names; nothing when it names others. No dims: all of them.
std::optional<int64_t> trailing(const Tensor& self, at::IntArrayRef dims) {
  if (dims.empty()) return self.dim();
  Dims named = zeros(self.shape.size());
  for (const int64_t dim : dims) {
    if (dim < -self.dim() || dim >= self.dim()) return std::nullopt;
    named[dim < 0 ? dim + self.dim() : dim] = 1;
  }
  const auto count = static_cast<int64_t>(dims.size());
  for (int64_t i = 0; i < self.dim(); ++i) {
    if ((named[i] != 0) != (i >= self.dim() - count)) return std::nullopt;
  }
  return count;
}

/// The strides of a result over the kept dimensions, whether or not it kept the reduced ones as 1.
std::optional<Dims> kept_strides(const Tensor& out, c10::ArrayRef<int64_t> kept) {
  if (out.dim() < static_cast<int64_t>(kept.size())) return std::nullopt;
  if (c10::ArrayRef<int64_t>(out.shape).slice(0, kept.size()) != kept) return std::nullopt;
  return first_dims(out.strides, kept.size());
}

/// Folds the last `count` dimensions. `out` or `indices` may be null.
Work fold(Fold operation, const Tensor& self, int64_t count, const Tensor* out, const Tensor* indices) {
  const auto from = float_type(self);
  const auto to = out != nullptr ? float_type(*out) : from;
  if (!from || !to) return nullptr;
  const c10::ArrayRef<int64_t> shape(self.shape), strides(self.strides);
  const size_t kept = shape.size() - static_cast<size_t>(count);
  int64_t width = 1;
  for (size_t i = shape.size(); i > kept; --i) {
    if (shape[i - 1] != 1 && strides[i - 1] != width) return nullptr;
    width *= shape[i - 1];
  }
  if (width == 0 || self.numel() == 0) return nullptr;
  const std::optional<Dims> still = zeros(kept);
  const auto out_strides = out != nullptr ? kept_strides(*out, shape.slice(0, kept)) : still;
  const auto index_strides = indices != nullptr ? kept_strides(*indices, shape.slice(0, kept)) : still;
  if (!out_strides || !index_strides) return nullptr;
  const Dims in_strides = first_dims(strides, kept);
  const auto nest = nest_of<3>(shape.slice(0, kept), {*out_strides, in_strides, *index_strides});
  if (!nest) return nullptr;
  return bind(kernels::reduction_kernel(operation, *from, *to),
              {out != nullptr ? out->data() : nullptr, self.data(),
               indices != nullptr ? indices->data<int64_t>() : nullptr, width, *nest});
}

Work fold_dims(Fold operation, const Tensor& self, at::IntArrayRef dims, const Tensor& out) {
  const auto count = trailing(self, dims);
  return count ? fold(operation, self, *count, &out, nullptr) : nullptr;
}

bool is_last(const Tensor& self, int64_t dim) {
  return self.dim() > 0 && (dim == -1 || dim == self.dim() - 1);
}

}  // namespace

Work sum(const Tensor& self, at::IntArrayRef dims, const Tensor& out) {
  return fold_dims(Fold::kSum, self, dims, out);
}
Work mean(const Tensor& self, at::IntArrayRef dims, const Tensor& out) {
  return fold_dims(Fold::kMean, self, dims, out);
}
Work amax(const Tensor& self, at::IntArrayRef dims, const Tensor& out) {
  return self.dtype == out.dtype ? fold_dims(Fold::kMaximum, self, dims, out) : nullptr;
}
Work amin(const Tensor& self, at::IntArrayRef dims, const Tensor& out) {
  return self.dtype == out.dtype ? fold_dims(Fold::kMinimum, self, dims, out) : nullptr;
}

Work argmax(const Tensor& self, int64_t dim, const Tensor& out) {
  if (!is_last(self, dim) || out.dtype != c10::ScalarType::Long) return nullptr;
  return fold(Fold::kArgMax, self, 1, nullptr, &out);
}

Work max_dim(const Tensor& self, int64_t dim, const Tensor& out, const Tensor& indices) {
  if (!is_last(self, dim) || out.dtype != self.dtype || indices.dtype != c10::ScalarType::Long)
    return nullptr;
  return fold(Fold::kMaxIndex, self, 1, &out, &indices);
}

Work softmax(const Tensor& self, int64_t dim, const Tensor& out) {
  if (!is_last(self, dim) || out.shape != self.shape) return nullptr;
  if (out.strides.back() != 1 && out.shape.back() != 1) return nullptr;
  return fold(Fold::kSoftmax, self, 1, &out, nullptr);
}

}  // namespace aclnn::prepared
