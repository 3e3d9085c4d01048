#include "runtime/kernels/gemv.h"

#include <ATen/Parallel.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "runtime/aclnn/layout.h"
#include "runtime/kernels/dtype.h"
#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {
namespace {

/// Where the weight lies. `by_rows`: element (k, n) at n * step + k, or for fractals at
/// (k / width) * block + n * width + k % width. Otherwise: at (n / width) * block + k * step + n % width.
struct MatmulWeight {
  const void* data;
  bool by_rows;
  int64_t k, n;
  int64_t width;  // columns (or, by rows, elements of k) that lie together: 16, or 0 when all of them do
  int64_t block;  // elements from one fractal column to the next
  int64_t step;
};

/// Activations in fp32, each row padded with zeros to a multiple of 32, and the result.
struct MatmulRows {
  const float* x;
  int64_t count;
  int64_t stride;
  const void* bias;
  void* out;
};

}  // namespace

#define KERNEL_SOURCE "runtime/kernels/gemv.inc"
#include "runtime/kernels/per_isa.h"

namespace {

using Product = void (*)(const MatmulRows&, const MatmulWeight&, int64_t, int64_t);
using Widen = void (*)(const void*, float*, int64_t, int64_t, int64_t);

template <typename T>
std::pair<Product, Widen> kernels_of() {
  return {PER_ISA(small_product<T>), PER_ISA(widen_rows<T>)};
}

}  // namespace
}  // namespace host_runtime::kernels

namespace aclnn::kernels {
namespace {

using host_runtime::kernels::MatmulRows;
using host_runtime::kernels::MatmulWeight;

constexpr int64_t kMostRows = 8;
constexpr int64_t kParallelWeights = int64_t{1}
                                     << 17;  // below, waking another thread costs more than it saves
constexpr int64_t kFractalWidth = 16;

bool describe_plain(const Tensor& t, MatmulWeight& w) {
  w.data = t.data();
  if (t.stride(0) == 1 || t.size(0) == 1) {
    w.by_rows = true;
    w.step = t.stride(1);
    return t.size(1) == 1 || w.step >= t.size(0);
  }
  w.by_rows = false;
  w.step = t.stride(0);
  return t.stride(1) == 1 && w.step >= t.size(1);
}

bool describe_fractals(const Tensor& t, MatmulWeight& w) {
  const NzView v = nz_view(t);
  w.data = t.storage;
  w.by_rows = v.transposed;
  w.width = w.step = v.fractal_columns;
  w.block = v.row_blocks * kFractalRows * v.fractal_columns;
  return w.width == kFractalWidth;
}

bool shapes_fit(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& out) {
  if (weight.dim() != 2 || x.dim() < 1 || out.dim() < 1 || !x.is_contiguous() || !out.is_contiguous())
    return false;
  const int64_t k = weight.size(0), n = weight.size(1);
  if (k == 0 || n == 0 || x.numel() == 0 || x.size(-1) != k || x.numel() / k > kMostRows) return false;
  if (out.numel() != x.numel() / k * n || out.size(-1) != n) return false;
  return bias == nullptr || (bias->dim() == 1 && bias->numel() == n && bias->is_contiguous());
}

}  // namespace

Work small_matmul(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& out) {
  const auto dtype = x.dtype;
  if (weight.dtype != dtype || out.dtype != dtype || (bias != nullptr && bias->dtype != dtype))
    return nullptr;
  if (!shapes_fit(x, weight, bias, out)) return nullptr;
  std::pair<host_runtime::kernels::Product, host_runtime::kernels::Widen> kernels{};
  if (dtype == c10::ScalarType::Float) kernels = host_runtime::kernels::kernels_of<float>();
  if (dtype == c10::ScalarType::BFloat16)
    kernels = host_runtime::kernels::kernels_of<host_runtime::kernels::BFloat>();
  if (dtype == c10::ScalarType::Half)
    kernels = host_runtime::kernels::kernels_of<host_runtime::kernels::Half>();
  if (kernels.first == nullptr) return nullptr;
  const int64_t k = weight.size(0), n = weight.size(1), m = x.numel() / k;
  MatmulWeight w{nullptr, false, k, n, 0, 0, 0};
  if (!(weight.is_plain() ? describe_plain(weight, w) : describe_fractals(weight, w))) return nullptr;
  const int64_t stride = (k + 31) / 32 * 32 + 32;  // not a power of two, so that rows do not share cache sets
  const int64_t grain = std::max<int64_t>(1, kParallelWeights / k / 64);
  return [product = kernels.first, widen = kernels.second, w, m, stride, grain, from = x.data(),
          bias = bias ? bias->data() : nullptr, to = out.data(),
          scratch = std::vector<float>(static_cast<size_t>(m * stride))]() mutable {
    widen(from, scratch.data(), m, w.k, stride);
    const MatmulRows rows{scratch.data(), m, stride, bias, to};
    if (w.n * w.k <= kParallelWeights) return product(rows, w, 0, w.n);
    // Ranges start at multiples of 64, and so at whole fractals.
    at::parallel_for(0, (w.n + 63) / 64, grain, [&](int64_t begin, int64_t end) {
      product(rows, w, begin * 64, std::min(end * 64, w.n));
    });
  };
}

Work small_addmm(const Tensor& self, const Tensor& x, const Tensor& weight, const c10::Scalar& beta,
                 const c10::Scalar& alpha, const Tensor& out) {
  if (beta.isComplex() || alpha.isComplex() || beta.toDouble() != 1 || alpha.toDouble() != 1) return nullptr;
  return small_matmul(x, weight, &self, out);
}

}  // namespace aclnn::kernels
