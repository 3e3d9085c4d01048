// What the prepared operators share: dtypes as the kernels know them, and operands as nested loops.
#pragma once

#include <optional>

#include "runtime/aclnn/tensor.h"
#include "runtime/kernels/discrete.h"
#include "runtime/kernels/dtype.h"
#include "runtime/kernels/nest.h"

namespace aclnn::prepared {

namespace kernels = host_runtime::kernels;

/// float32, float16 and bfloat16 as the kernels know them.
std::optional<kernels::Type> float_type(const Tensor& tensor);
/// The same with int32, int64 and bool.
std::optional<kernels::Element> element_type(const Tensor& tensor);

/// Strides of `tensor` seen in `shape`, 0 where it is repeated; nothing when it does not broadcast.
std::optional<Dims> broadcast_strides(const Tensor& tensor, c10::ArrayRef<int64_t> shape);

/// `count` zeros, and the first `count` of `dims`.
Dims zeros(size_t count);
Dims first_dims(c10::ArrayRef<int64_t> dims, size_t count);

/// One operand's strides over a shape, in elements.
using StridesOf = c10::ArrayRef<Dims>;

struct Loops {
  Dims sizes;
  std::vector<Dims> strides;  ///< by operand
};
/// Drops dimensions of one element, orders the others by the first operand's strides (largest outside) and
/// merges what lies one behind the other in all operands.
Loops simplified(c10::ArrayRef<int64_t> shape, StridesOf operands);

template <size_t N>
std::optional<kernels::Nest<static_cast<int>(N)>> nest_of(c10::ArrayRef<int64_t> shape, StridesOf operands) {
  using Nest = kernels::Nest<static_cast<int>(N)>;
  Nest nest;
  for (const int64_t size : shape) nest.empty |= size == 0;
  if (nest.empty) return nest;
  const Loops loops = simplified(shape, operands);
  const auto dims = static_cast<int>(loops.sizes.size());
  if (dims > Nest::kMaxOuter + 1) return std::nullopt;
  nest.outer = dims > 0 ? dims - 1 : 0;
  for (int i = 0; i < dims; ++i) {
    typename Nest::Offsets strides;
    for (size_t operand = 0; operand < N; ++operand) strides[operand] = loops.strides[operand][i];
    if (i < nest.outer) {
      nest.sizes[i] = loops.sizes[i];
      nest.strides[i] = strides;
    } else {
      nest.width = loops.sizes[i];
      nest.step = strides;
    }
  }
  return nest;
}

/// The loops over `operands`, the first of which has the full shape and is written; the others broadcast to
/// it. Null operands do not move.
template <size_t N>
std::optional<kernels::Nest<static_cast<int>(N)>> broadcast_nest(const Tensor* const (&operands)[N]) {
  const Tensor& out = *operands[0];
  std::vector<Dims> strides;
  for (const Tensor* operand : operands) {
    if (operand == nullptr) {
      strides.emplace_back(zeros(out.shape.size()));
      continue;
    }
    std::optional<Dims> own = broadcast_strides(*operand, out.shape);
    if (!own) return std::nullopt;
    strides.push_back(*std::move(own));
  }
  for (int64_t i = 0; i < out.dim(); ++i) {
    if (out.shape[i] > 1 && out.strides[i] == 0) return std::nullopt;
  }
  return nest_of<N>(out.shape, strides);
}

/// A kernel with its arguments.
template <typename Arguments>
Work bind(void (*kernel)(const Arguments&), const Arguments& arguments) {
  if (kernel == nullptr) return nullptr;
  return [kernel, arguments] { kernel(arguments); };
}

}  // namespace aclnn::prepared
