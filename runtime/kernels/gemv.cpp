#include "runtime/kernels/gemv.h"

#include <ATen/Parallel.h>

#include <vector>

#include "runtime/aclnn/layout.h"
#include "runtime/kernels/simd.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace aclnn::kernels {
namespace {

constexpr int64_t kMostRows = 8;
constexpr int64_t kParallelWeights = int64_t{1}
                                     << 17;  // below, waking another thread costs more than it saves
constexpr int64_t kWeightsTogether = 32;
constexpr int64_t kLanes = 8;

using Lanes = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
using Halves = uint16_t __attribute__((vector_size(16)));
using Order = int32_t __attribute__((vector_size(32)));

/// Where the weight lies. `rows`: element (k, n) at n * step + k, or for fractals at
/// (k / width) * block + n * width + k % width. `columns`: at (n / width) * block + k * step + n % width.
struct Weight {
  const void* data;
  bool by_rows;
  int64_t k, n;
  int64_t width;  // columns (or, by rows, elements of k) that lie together; 0 when all of them do
  int64_t block;  // elements from one fractal column to the next
  int64_t step;
};

/// Activations in fp32, each row padded with zeros to a multiple of 32, and the result.
struct Rows {
  const float* x;
  int64_t count;
  int64_t stride;
  const void* bias;
  void* out;
};

INLINE_KERNEL void load(Lanes& v, const float* p) { std::memcpy(&v, p, sizeof(v)); }
INLINE_KERNEL void load(Lanes& v, const uint16_t* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  std::memcpy(&v, &words, sizeof(v));
}

INLINE_KERNEL float sum(const Lanes& v) {
  const Lanes a = v + __builtin_shuffle(v, Order{4, 5, 6, 7, 0, 1, 2, 3});
  const Lanes b = a + __builtin_shuffle(a, Order{2, 3, 0, 1, 6, 7, 4, 5});
  return b[0] + b[1];
}

template <typename Dtype>
INLINE_KERNEL void put(const Rows& rows, const Weight& w, int64_t m, int64_t n, float value) {
  using Stored = typename Dtype::Stored;
  if (rows.bias != nullptr) value += Dtype::load(static_cast<const Stored*>(rows.bias)[n]);
  static_cast<Stored*>(rows.out)[m * w.n + n] = Dtype::store(value);
}

/// Dot products of `Count` rows of x with weight rows [begin, end), each of them contiguous.
template <typename Dtype, int Count>
INLINE_KERNEL void dot_contiguous(const Rows& rows, const Weight& w, int64_t m, int64_t begin, int64_t end) {
  const auto* data = static_cast<const typename Dtype::Stored*>(w.data);
  const float* x = rows.x + m * rows.stride;
  const int64_t whole = w.k / (2 * kLanes) * (2 * kLanes);
  for (int64_t n = begin; n < end; ++n) {
    const auto* row = data + n * w.step;
    Lanes even[Count] = {}, odd[Count] = {};
    for (int64_t k = 0; k < whole; k += 2 * kLanes) {
      Lanes w0, w1;
      load(w0, row + k);
      load(w1, row + k + kLanes);
      for (int i = 0; i < Count; ++i) {
        Lanes x0, x1;
        load(x0, x + i * rows.stride + k);
        load(x1, x + i * rows.stride + k + kLanes);
        even[i] += w0 * x0;
        odd[i] += w1 * x1;
      }
    }
    for (int i = 0; i < Count; ++i) {
      float total = sum(even[i] + odd[i]);
      for (int64_t k = whole; k < w.k; ++k) total += Dtype::load(row[k]) * x[i * rows.stride + k];
      put<Dtype>(rows, w, m + i, n, total);
    }
  }
}

/// The same where k is cut into fractals of `width` elements.
template <typename Dtype, int Count>
INLINE_KERNEL void dot_fractal(const Rows& rows, const Weight& w, int64_t m, int64_t begin, int64_t end) {
  const auto* data = static_cast<const typename Dtype::Stored*>(w.data);
  const float* x = rows.x + m * rows.stride;
  const int64_t fractals = (w.k + w.width - 1) / w.width;
  for (int64_t n = begin; n < end; ++n) {
    Lanes total[Count] = {};
    for (int64_t f = 0; f < fractals; ++f) {
      const auto* run = data + f * w.block + n * w.width;
      for (int64_t j = 0; j < w.width; j += kLanes) {
        Lanes weight;
        load(weight, run + j);
        for (int i = 0; i < Count; ++i) {
          Lanes value;
          load(value, x + i * rows.stride + f * w.width + j);
          total[i] += weight * value;
        }
      }
    }
    for (int i = 0; i < Count; ++i) put<Dtype>(rows, w, m + i, n, sum(total[i]));
  }
}

/// `Count` rows of x times Vectors * 8 columns that lie together, from `column` on; writes `valid` of them.
template <typename Dtype, int Count, int Vectors>
INLINE_KERNEL void columns_together(const Rows& rows, const Weight& w, int64_t m,
                                    const typename Dtype::Stored* at, int64_t column, int64_t valid) {
  const float* x = rows.x + m * rows.stride;
  Lanes total[Count][Vectors] = {};
  for (int64_t k = 0; k < w.k; ++k, at += w.step) {
    for (int v = 0; v < Vectors; ++v) {
      Lanes weight;
      load(weight, at + v * kLanes);
      for (int i = 0; i < Count; ++i) total[i][v] += weight * x[i * rows.stride + k];
    }
  }
  for (int i = 0; i < Count; ++i) {
    for (int64_t j = 0; j < valid; ++j)
      put<Dtype>(rows, w, m + i, column + j, total[i][j / kLanes][j % kLanes]);
  }
}

/// Columns [begin, end), which start at a multiple of the fractal's width.
template <typename Dtype, int Count>
INLINE_KERNEL void by_columns(const Rows& rows, const Weight& w, int64_t m, int64_t begin, int64_t end) {
  const auto* data = static_cast<const typename Dtype::Stored*>(w.data);
  if (w.width != 0) {
    for (int64_t n = begin; n < end; n += w.width) {
      const auto* at = data + n / w.width * w.block;
      const int64_t valid = std::min(w.width, end - n);
      if (w.width == kLanes) columns_together<Dtype, Count, 1>(rows, w, m, at, n, valid);
      if (w.width == 2 * kLanes) columns_together<Dtype, Count, 2>(rows, w, m, at, n, valid);
    }
    return;
  }
  int64_t n = begin;
  for (; n + 4 * kLanes <= end; n += 4 * kLanes) {
    columns_together<Dtype, Count, 4>(rows, w, m, data + n, n, 4 * kLanes);
  }
  for (; n + kLanes <= end; n += kLanes) columns_together<Dtype, Count, 1>(rows, w, m, data + n, n, kLanes);
  for (; n < end; ++n) {
    for (int i = 0; i < Count; ++i) {
      float total = 0;
      for (int64_t k = 0; k < w.k; ++k)
        total += Dtype::load(data[k * w.step + n]) * rows.x[(m + i) * rows.stride + k];
      put<Dtype>(rows, w, m + i, n, total);
    }
  }
}

template <typename Dtype, int Count>
INLINE_KERNEL void some_rows(const Rows& rows, const Weight& w, int64_t m, int64_t begin, int64_t end) {
  if (!w.by_rows) {
    by_columns<Dtype, Count>(rows, w, m, begin, end);
  } else if (w.width != 0) {
    dot_fractal<Dtype, Count>(rows, w, m, begin, end);
  } else {
    dot_contiguous<Dtype, Count>(rows, w, m, begin, end);
  }
}

template <typename Dtype>
INLINE_KERNEL void all_rows(const Rows& rows, const Weight& w, int64_t begin, int64_t end) {
  // A few weights at a time for all rows of x, so that weights come from memory once.
  for (int64_t n = begin; n < end; n += kWeightsTogether) {
    const int64_t stop = std::min(end, n + kWeightsTogether);
    int64_t m = 0;
    for (; m + 4 <= rows.count; m += 4) some_rows<Dtype, 4>(rows, w, m, n, stop);
    for (; m + 2 <= rows.count; m += 2) some_rows<Dtype, 2>(rows, w, m, n, stop);
    for (; m < rows.count; ++m) some_rows<Dtype, 1>(rows, w, m, n, stop);
  }
}

using Kernel = void (*)(const Rows& rows, const Weight& w, int64_t begin, int64_t end);
FOR_EACH_ISA void product_F32(const Rows& rows, const Weight& w, int64_t begin, int64_t end) {
  all_rows<F32>(rows, w, begin, end);
}
FOR_EACH_ISA void product_BF16(const Rows& rows, const Weight& w, int64_t begin, int64_t end) {
  all_rows<BF16>(rows, w, begin, end);
}

using Widen = void (*)(const void* from, float* to, int64_t rows, int64_t k, int64_t stride);
template <typename Dtype>
INLINE_KERNEL void widen_rows(const void* from, float* to, int64_t rows, int64_t k, int64_t stride) {
  const auto* x = static_cast<const typename Dtype::Stored*>(from);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < k; ++i) to[m * stride + i] = Dtype::load(x[m * k + i]);
  }
}
FOR_EACH_ISA void widen_F32(const void* from, float* to, int64_t rows, int64_t k, int64_t stride) {
  widen_rows<F32>(from, to, rows, k, stride);
}
FOR_EACH_ISA void widen_BF16(const void* from, float* to, int64_t rows, int64_t k, int64_t stride) {
  widen_rows<BF16>(from, to, rows, k, stride);
}

bool describe_plain(const Tensor& t, Weight& w) {
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

void describe_fractals(const Tensor& t, Weight& w) {
  const NzView v = nz_view(t);
  w.data = t.storage;
  w.by_rows = v.transposed;
  w.width = w.step = v.fractal_columns;
  w.block = v.row_blocks * kFractalRows * v.fractal_columns;
}

}  // namespace

Work small_matmul(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& out) {
  const auto dtype = x.dtype;
  const bool fp32 = dtype == c10::ScalarType::Float;
  if ((!fp32 && dtype != c10::ScalarType::BFloat16) || weight.dtype != dtype || out.dtype != dtype)
    return nullptr;
  if (weight.dim() != 2 || x.dim() < 1 || !x.is_contiguous() || !out.is_contiguous()) return nullptr;
  const int64_t k = weight.size(0), n = weight.size(1);
  if (k == 0 || n == 0 || x.size(-1) != k || x.numel() / k > kMostRows) return nullptr;
  const int64_t m = x.numel() / k;
  if (m == 0 || out.numel() != m * n || out.size(-1) != n) return nullptr;
  if (bias != nullptr &&
      (bias->dtype != dtype || bias->numel() != n || bias->size(-1) != n || !bias->is_contiguous())) {
    return nullptr;
  }
  Weight w{nullptr, false, k, n, 0, 0, 0};
  if (!weight.is_plain()) {
    describe_fractals(weight, w);
  } else if (!describe_plain(weight, w)) {
    return nullptr;
  }
  const int64_t stride = (k + 31) / 32 * 32 + 32;  // not a power of two, so that rows do not share cache sets
  const Kernel kernel = fp32 ? product_F32 : product_BF16;
  const Widen widen_x = fp32 ? widen_F32 : widen_BF16;
  const int64_t grain = std::max<int64_t>(64, kParallelWeights / k / 64 * 64);
  return [kernel, widen_x, w, m, stride, grain, from = x.data(), bias = bias ? bias->data() : nullptr,
          to = out.data(), scratch = std::vector<float>(static_cast<size_t>(m * stride))]() mutable {
    widen_x(from, scratch.data(), m, w.k, stride);
    const Rows rows{scratch.data(), m, stride, bias, to};
    if (w.n * w.k <= kParallelWeights) return kernel(rows, w, 0, w.n);
    // Ranges start at multiples of 64, and so at whole fractals.
    at::parallel_for(0, (w.n + 63) / 64, grain / 64, [&](int64_t begin, int64_t end) {
      kernel(rows, w, begin * 64, std::min(end * 64, w.n));
    });
  };
}

Work small_addmm(const Tensor& self, const Tensor& x, const Tensor& weight, const c10::Scalar& beta,
                 const c10::Scalar& alpha, const Tensor& out) {
  if (beta.isComplex() || alpha.isComplex() || beta.toDouble() != 1 || alpha.toDouble() != 1) return nullptr;
  if (self.dim() != 1) return nullptr;
  return small_matmul(x, weight, &self, out);
}

}  // namespace aclnn::kernels
