#include <ATen/core/ATen_fwd.h>

#include "runtime/aclnn/prepared.h"
#include "runtime/aclnn/prepared_support.h"
#include "runtime/kernels/copy.h"
#include "runtime/kernels/memory.h"

namespace aclnn::prepared {
namespace {

using kernels::Copy;

struct CopyStep {
  kernels::CopyKernel kernel;
  Copy arguments;
};

/// A copy between elements of one dtype.
std::optional<CopyStep> copy_step(const Tensor& to, const Tensor& from) {
  const auto nest = broadcast_nest({&to, &from});
  if (!nest) return std::nullopt;
  const auto kernel = kernels::copy_kernel(static_cast<int64_t>(to.itemsize()), *nest);
  if (kernel == nullptr) return std::nullopt;
  return CopyStep{kernel, {to.data(), from.data(), 0, *nest}};
}

Work convert(const Tensor& to, const Tensor& from) {
  if (const auto source = float_type(from), target = float_type(to); source && target) {
    const auto nest = broadcast_nest({&to, &from, static_cast<const Tensor*>(nullptr)});
    if (!nest) return nullptr;
    return bind(kernels::cast_kernel(*source, *target, *nest),
                {to.data(), from.data(), nullptr, 0.0f, 1.0f, *nest});
  }
  const auto source = element_type(from), target = element_type(to);
  const auto nest = broadcast_nest({&to, &from, static_cast<const Tensor*>(nullptr), nullptr});
  if (!source || !target || !nest) return nullptr;
  return bind(kernels::conversion_kernel(*source, *target),
              {to.data(), from.data(), nullptr, nullptr, 1, 0, *nest});
}

}  // namespace

Work copy(const Tensor& self, const Tensor& source) {
  if (self.dtype != source.dtype) return convert(self, source);
  const auto step = copy_step(self, source);
  return step ? bind(step->kernel, step->arguments) : nullptr;
}

Work fill(const Tensor& self, const at::Scalar& value) {
  const auto type = element_type(self);
  const auto nest = broadcast_nest({&self, static_cast<const Tensor*>(nullptr)});
  if (!type || !nest || value.isComplex()) return nullptr;
  const uint64_t bits = value.isFloatingPoint() ? kernels::constant_of(*type, value.to<double>())
                                                : kernels::constant_of(*type, value.to<int64_t>());
  if (bits == 0 && self.is_contiguous()) return aclnn::kernels::zero(self);
  return bind(kernels::fill_kernel(static_cast<int64_t>(self.itemsize())),
              {self.data(), nullptr, bits, *nest});
}

Work cat(const TensorList& tensors, int64_t dim, const Tensor& out) {
  if (out.dim() == 0) return nullptr;
  const int64_t axis = dim < 0 ? dim + out.dim() : dim;
  std::vector<CopyStep> steps;
  Tensor part;
  part.shape = out.shape;
  part.strides = out.strides;
  part.offset = out.offset;
  part.dtype = out.dtype;
  part.storage = out.storage;
  int64_t filled = 0;
  for (const TensorRef& tensor : tensors.tensors) {
    // ATen skips what torch.tensor([]) gives, whatever the other shapes are.
    if (tensor->dim() == 1 && tensor->numel() == 0 && out.dim() != 1) continue;
    if (tensor->dtype != out.dtype || tensor->dim() != out.dim()) return nullptr;
    for (int64_t i = 0; i < out.dim(); ++i) {
      if (i != axis && tensor->shape[i] != out.shape[i]) return nullptr;
    }
    part.shape[axis] = tensor->shape[axis];
    part.offset = out.offset + filled * out.strides[axis];
    filled += tensor->shape[axis];
    if (filled > out.shape[axis]) return nullptr;
    if (tensor->numel() == 0) continue;
    const auto step = copy_step(part, *tensor);
    if (!step) return nullptr;
    steps.push_back(*step);
  }
  if (filled != out.shape[axis]) return nullptr;
  return [steps = std::move(steps)] {
    for (const CopyStep& step : steps) step.kernel(step.arguments);
  };
}

}  // namespace aclnn::prepared
