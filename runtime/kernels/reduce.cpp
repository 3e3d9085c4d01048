#include "runtime/kernels/reduce.h"

#include <limits>
#include <vector>

#include "runtime/kernels/simd.h"

namespace aclnn::kernels {
namespace {

constexpr int kLanes = 32;  // partial results that the compiler may keep in vector registers

template <typename Dtype>
INLINE_KERNEL float sum_row(const typename Dtype::Stored* x, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += Dtype::load(x[i + j]);
  }
  float total = 0;
  for (; i < n; ++i) total += Dtype::load(x[i]);
  for (float lane : lanes) total += lane;
  return total;
}

template <typename Dtype>
INLINE_KERNEL void sum_rows(const void* from, void* to, int64_t rows, int64_t n, float scale) {
  const auto* x = static_cast<const typename Dtype::Stored*>(from);
  auto* out = static_cast<typename Dtype::Stored*>(to);
  for (int64_t r = 0; r < rows; ++r) out[r] = Dtype::store(sum_row<Dtype>(x + r * n, n) * scale);
}

template <typename Dtype>
INLINE_KERNEL float max_row(const typename Dtype::Stored* x, int64_t n) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float v = Dtype::load(x[i + j]);
      lanes[j] = v > lanes[j] || v != v ? v : lanes[j];
    }
  }
  float best = -std::numeric_limits<float>::infinity();
  for (; i < n; ++i) {
    const float v = Dtype::load(x[i]);
    best = v > best || v != v ? v : best;
  }
  for (float v : lanes) best = v > best || v != v ? v : best;
  return best;
}

/// Position of the first of the largest elements, or of the first NaN (max_row is NaN then, and equals
/// nothing).
template <typename Dtype>
INLINE_KERNEL int64_t argmax_row(const typename Dtype::Stored* x, int64_t n) {
  const float best = max_row<Dtype>(x, n);
  for (int64_t i = 0; i < n; ++i) {
    const float v = Dtype::load(x[i]);
    if (v == best || v != v) return i;
  }
  return 0;
}

template <typename Dtype>
INLINE_KERNEL void argmax_rows(const void* from, void* to, int64_t rows, int64_t n, bool wide) {
  const auto* x = static_cast<const typename Dtype::Stored*>(from);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = argmax_row<Dtype>(x + r * n, n);
    if (wide) {
      static_cast<int64_t*>(to)[r] = position;
    } else {
      static_cast<int32_t*>(to)[r] = static_cast<int32_t>(position);
    }
  }
}

template <typename Dtype>
INLINE_KERNEL void softmax_rows(const void* from, void* to, int64_t rows, int64_t n, float* scratch) {
  const auto* x = static_cast<const typename Dtype::Stored*>(from);
  auto* out = static_cast<typename Dtype::Stored*>(to);
  for (int64_t r = 0; r < rows; ++r, x += n, out += n) {
    const float best = max_row<Dtype>(x, n);
    for (int64_t i = 0; i < n; ++i) scratch[i] = exponential(Dtype::load(x[i]) - best);
    const float inverse = 1.F / sum_row<F32>(scratch, n);
    for (int64_t i = 0; i < n; ++i) out[i] = Dtype::store(scratch[i] * inverse);
  }
}

#define DEFINE_REDUCTIONS(Dtype)                                                                         \
  FOR_EACH_ISA void sum_##Dtype(const void* x, void* out, int64_t rows, int64_t n, float scale) {        \
    sum_rows<Dtype>(x, out, rows, n, scale);                                                             \
  }                                                                                                      \
  FOR_EACH_ISA void argmax_##Dtype(const void* x, void* out, int64_t rows, int64_t n, bool wide) {       \
    argmax_rows<Dtype>(x, out, rows, n, wide);                                                           \
  }                                                                                                      \
  FOR_EACH_ISA void softmax_##Dtype(const void* x, void* out, int64_t rows, int64_t n, float* scratch) { \
    softmax_rows<Dtype>(x, out, rows, n, scratch);                                                       \
  }
DEFINE_REDUCTIONS(F32)
DEFINE_REDUCTIONS(BF16)

/// fp32 or bf16, contiguous, of at least one element, and `dim` is the last one.
bool suits(const Tensor& x, int64_t dim) {
  return (x.dtype == c10::ScalarType::Float || x.dtype == c10::ScalarType::BFloat16) && x.dim() > 0 &&
         (dim == -1 || dim == x.dim() - 1) && x.numel() > 0 && x.is_contiguous();
}

}  // namespace

Work sum_last(const Tensor& x, c10::ArrayRef<int64_t> dims, const Tensor& out, bool mean) {
  if (dims.size() != 1 || !suits(x, dims[0]) || out.dtype != x.dtype || !out.is_contiguous()) return nullptr;
  const int64_t n = x.size(-1), rows = x.numel() / n;
  if (out.numel() != rows) return nullptr;
  const auto kernel = x.dtype == c10::ScalarType::Float ? sum_F32 : sum_BF16;
  const float scale = mean ? 1.F / static_cast<float>(n) : 1.F;
  return [kernel, from = x.data(), to = out.data(), rows, n, scale] { kernel(from, to, rows, n, scale); };
}

Work argmax_last(const Tensor& x, int64_t dim, const Tensor& out) {
  const bool wide = out.dtype == c10::ScalarType::Long;
  if (!suits(x, dim) || (!wide && out.dtype != c10::ScalarType::Int) || !out.is_contiguous()) return nullptr;
  const int64_t n = x.size(-1), rows = x.numel() / n;
  if (out.numel() != rows) return nullptr;
  const auto kernel = x.dtype == c10::ScalarType::Float ? argmax_F32 : argmax_BF16;
  return [kernel, from = x.data(), to = out.data(), rows, n, wide] { kernel(from, to, rows, n, wide); };
}

Work softmax_last(const Tensor& x, int64_t dim, const Tensor& out) {
  if (!suits(x, dim) || out.dtype != x.dtype || !out.is_contiguous()) return nullptr;
  const int64_t n = x.size(-1), rows = x.numel() / n;
  const auto kernel = x.dtype == c10::ScalarType::Float ? softmax_F32 : softmax_BF16;
  return [kernel, from = x.data(), to = out.data(), rows, n,
          scratch = std::vector<float>(static_cast<size_t>(n))]() mutable {
    kernel(from, to, rows, n, scratch.data());
  };
}

}  // namespace aclnn::kernels
