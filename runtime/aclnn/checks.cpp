#include "runtime/aclnn/checks.h"

namespace aclnn::check {
namespace {

std::string list(std::initializer_list<c10::ScalarType> dtypes) {
  std::string text;
  for (c10::ScalarType dtype : dtypes) text += (text.empty() ? "" : ", ") + dtype_name(dtype);
  return text;
}

}  // namespace

void same_dtype(const Call& call, std::initializer_list<Named> tensors) {
  const Named* first = nullptr;
  for (const Named& named : tensors) {
    if (named.tensor == nullptr) continue;
    if (first == nullptr) {
      first = &named;
    } else if (named.tensor->dtype != first->tensor->dtype) {
      call.refuse(named.name, "is " + dtype_name(named.tensor->dtype) + ", but must have the dtype of `" +
                                  first->name + "`, " + dtype_name(first->tensor->dtype));
    }
  }
}

void same_shape(const Call& call, std::initializer_list<Named> tensors) {
  const Named* first = nullptr;
  for (const Named& named : tensors) {
    if (named.tensor == nullptr) continue;
    if (first == nullptr) {
      first = &named;
    } else if (named.tensor->shape != first->tensor->shape) {
      call.refuse(named.name, "has shape " + describe(named.tensor->shape) + ", but must have that of `" +
                                  first->name + "`, " + describe(first->tensor->shape));
    }
  }
}

void dtype_in(const Call& call, Named named, std::initializer_list<c10::ScalarType> allowed) {
  if (named.tensor == nullptr) return;
  for (c10::ScalarType dtype : allowed) {
    if (named.tensor->dtype == dtype) return;
  }
  call.refuse(named.name, "is " + dtype_name(named.tensor->dtype) + ", but must be one of: " + list(allowed));
}

void rank_between(const Call& call, Named named, int64_t low, int64_t high) {
  if (named.tensor == nullptr || (named.tensor->dim() >= low && named.tensor->dim() <= high)) return;
  call.refuse(named.name, "has " + std::to_string(named.tensor->dim()) + " dimensions, but must have " +
                              std::to_string(low) + (low == high ? "" : " to " + std::to_string(high)));
}

void broadcast(const Call& call, std::initializer_list<Named> operands, Named result) {
  Dims shape;
  for (const Named& named : operands) {
    if (named.tensor == nullptr) continue;
    const Tensor& t = *named.tensor;
    if (t.dim() > static_cast<int64_t>(shape.size())) shape.insert(shape.begin(), t.dim() - shape.size(), 1);
    for (int64_t i = 1; i <= t.dim(); ++i) {
      int64_t& size = shape[shape.size() - i];
      if (t.size(-i) == size || t.size(-i) == 1) continue;
      if (size != 1) {
        call.refuse(named.name,
                    "has shape " + describe(t.shape) + ", which does not broadcast with " + describe(shape));
      }
      size = t.size(-i);
    }
  }
  if (result.tensor != nullptr && result.tensor->shape != shape) {
    call.refuse(result.name, "has shape " + describe(result.tensor->shape) +
                                 ", but the operands broadcast to " + describe(shape));
  }
}

}  // namespace aclnn::check
