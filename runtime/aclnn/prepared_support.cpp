#include "runtime/aclnn/prepared_support.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace aclnn::prepared {

std::optional<kernels::Type> float_type(const Tensor& tensor) {
  switch (tensor.dtype) {
    case c10::ScalarType::Float:
      return kernels::Type::kFloat;
    case c10::ScalarType::Half:
      return kernels::Type::kHalf;
    case c10::ScalarType::BFloat16:
      return kernels::Type::kBFloat;
    default:
      return std::nullopt;
  }
}

std::optional<kernels::Element> element_type(const Tensor& tensor) {
  switch (tensor.dtype) {
    case c10::ScalarType::Float:
      return kernels::Element::kFloat;
    case c10::ScalarType::Half:
      return kernels::Element::kHalf;
    case c10::ScalarType::BFloat16:
      return kernels::Element::kBFloat;
    case c10::ScalarType::Int:
      return kernels::Element::kInt32;
    case c10::ScalarType::Long:
      return kernels::Element::kInt64;
    case c10::ScalarType::Bool:
      return kernels::Element::kBool;
    default:
      return std::nullopt;
  }
}

std::optional<Dims> broadcast_strides(const Tensor& tensor, c10::ArrayRef<int64_t> shape) {
  const auto dims = static_cast<int64_t>(shape.size());
  const int64_t missing = dims - tensor.dim();
  if (missing < 0) return std::nullopt;
  Dims strides;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t size = i < missing ? 1 : tensor.shape[i - missing];
    if (size != shape[i] && size != 1) return std::nullopt;
    strides.push_back(i >= missing && size == shape[i] ? tensor.strides[i - missing] : 0);
  }
  return strides;
}

Dims zeros(size_t count) {
  Dims dims;
  while (dims.size() < count) dims.push_back(0);
  return dims;
}

Dims first_dims(c10::ArrayRef<int64_t> dims, size_t count) {
  Dims first;
  for (const int64_t dim : dims.slice(0, count)) first.push_back(dim);
  return first;
}

Loops simplified(c10::ArrayRef<int64_t> shape, StridesOf operands) {
  std::vector<size_t> order;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] != 1) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::llabs(operands[0][a]) > std::llabs(operands[0][b]);
  });
  Loops loops;
  loops.strides.resize(operands.size());
  for (const size_t i : order) {
    bool merges = !loops.sizes.empty();
    for (size_t o = 0; o < operands.size() && merges; ++o)
      merges = loops.strides[o].back() == shape[i] * operands[o][i];
    if (merges) {
      loops.sizes.back() *= shape[i];
      for (size_t o = 0; o < operands.size(); ++o) loops.strides[o].back() = operands[o][i];
    } else {
      loops.sizes.push_back(shape[i]);
      for (size_t o = 0; o < operands.size(); ++o) loops.strides[o].push_back(operands[o][i]);
    }
  }
  return loops;
}

}  // namespace aclnn::prepared
