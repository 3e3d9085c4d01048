#include "runtime/kernels/loops.h"

namespace aclnn::kernels {
namespace {

constexpr int kMaxDims = 8;

struct Dimension {
  int64_t size;
  std::array<int64_t, kMaxOperands> stride;  // elements
};

/// Stride of `tensor` in dimension `i` of a result of rank `rank`; 0 where it is broadcast.
std::optional<int64_t> broadcast_stride(const Tensor& tensor, int64_t i, int64_t rank, int64_t size) {
  const int64_t own = i - (rank - tensor.dim());
  if (own < 0 || (tensor.shape[own] == 1 && size != 1)) return 0;
  if (tensor.shape[own] != size) return std::nullopt;
  return size == 1 ? 0 : tensor.strides[own];
}

bool merges(const Dimension& outer, const Dimension& inner, int operands) {
  for (int k = 0; k < operands; ++k) {
    if (outer.stride[k] != inner.stride[k] * inner.size) return false;
  }
  return true;
}

}  // namespace

std::optional<Loops> plan_loops(const Tensor& result, std::initializer_list<const Tensor*> others) {
  std::array<const Tensor*, kMaxOperands> operands{&result};
  int count = 1;
  for (const Tensor* other : others) operands[count++] = other;
  const int64_t rank = result.dim();
  if (rank > kMaxDims) return std::nullopt;
  for (int k = 0; k < count; ++k) {
    if (!operands[k]->is_plain() || operands[k]->dim() > rank) return std::nullopt;
  }

  std::array<Dimension, kMaxDims> dims;  // innermost first
  int used = 0;
  for (int64_t i = rank - 1; i >= 0; --i) {
    Dimension d{result.shape[i], {}};
    for (int k = 0; k < count; ++k) {
      const auto stride = broadcast_stride(*operands[k], i, rank, d.size);
      if (!stride) return std::nullopt;
      d.stride[k] = *stride;
    }
    if (d.size == 1) continue;
    if (used > 0 && merges(d, dims[used - 1], count)) {
      dims[used - 1].size *= d.size;
    } else {
      dims[used++] = d;
    }
  }

  Loops loops;
  loops.operands = count;
  for (int k = 0; k < count; ++k) loops.base[k] = operands[k]->data<char>();
  if (used == 0) return loops;
  loops.inner = dims[0].size;
  for (int k = 0; k < count; ++k) {
    const int64_t stride = dims[0].stride[k];
    if (stride != 1 && (stride != 0 || k == 0)) return std::nullopt;
    loops.broadcast[k] = stride == 0;
  }
  loops.outer = used - 1;
  if (loops.outer > kOuterLoops) return std::nullopt;
  for (int i = 0; i < loops.outer; ++i) {
    loops.size[i] = dims[i + 1].size;
    for (int k = 0; k < count; ++k) {
      loops.step[i][k] = dims[i + 1].stride[k] * static_cast<int64_t>(operands[k]->itemsize());
    }
  }
  return loops;
}

}  // namespace aclnn::kernels
