#include "runtime/kernels/memory.h"

#include <stdexcept>

#include "runtime/acl/task.h"
#include "runtime/kernels/loops.h"
#include "runtime/kernels/simd.h"

namespace aclnn::kernels {
namespace {

constexpr size_t kManyBytes = size_t{1} << 20;  // from here on, untouched pages are worth keeping untouched

template <typename T>
INLINE_KERNEL void fill_loop(void* to, int64_t n, uint64_t bits) {
  auto* out = static_cast<T*>(to);
  const auto value = static_cast<T>(bits);
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

using CastKernel = void (*)(const void* from, void* to, int64_t n);

template <typename From, typename To>
INLINE_KERNEL void cast_loop(const void* from, void* to, int64_t n) {
  const auto* x = static_cast<const typename From::Stored*>(from);
  auto* out = static_cast<typename To::Stored*>(to);
  for (int64_t i = 0; i < n; ++i) out[i] = To::store(static_cast<typename To::Value>(From::load(x[i])));
}
#define DEFINE_CAST(From, To)                                               \
  FOR_EACH_ISA void From##_to_##To(const void* from, void* to, int64_t n) { \
    cast_loop<From, To>(from, to, n);                                       \
  }
DEFINE_CAST(F32, BF16)
DEFINE_CAST(BF16, F32)
DEFINE_CAST(I32, I64)
DEFINE_CAST(I64, I32)
DEFINE_CAST(I32, F32)
DEFINE_CAST(I64, F32)

CastKernel find_cast(c10::ScalarType from, c10::ScalarType to) {
  using S = c10::ScalarType;
  if (from == S::Float && to == S::BFloat16) return F32_to_BF16;
  if (from == S::BFloat16 && to == S::Float) return BF16_to_F32;
  if (from == S::Int && to == S::Long) return I32_to_I64;
  if (from == S::Long && to == S::Int) return I64_to_I32;
  if (from == S::Int && to == S::Float) return I32_to_F32;
  if (from == S::Long && to == S::Float) return I64_to_F32;
  return nullptr;
}

/// The element's bits for a value, if the dtype holds it.
std::optional<uint64_t> element_bits(const c10::Scalar& value, c10::ScalarType dtype) {
  using S = c10::ScalarType;
  if (value.isComplex()) return std::nullopt;
  uint64_t bits = 0;
  if (dtype == S::Float) {
    const auto element = value.to<float>();
    std::memcpy(&bits, &element, sizeof(element));
  } else if (dtype == S::BFloat16) {
    bits = narrow(value.to<float>());
  } else if (value.isIntegral(/*includeBool=*/true) &&
             (dtype == S::Long || dtype == S::Int || dtype == S::Bool)) {
    bits = static_cast<uint64_t>(dtype == S::Bool ? value.toBool() : value.toLong());
  } else {
    return std::nullopt;
  }
  return bits;
}

/// One part of a concatenation: `bytes` from `from`, repeated `outer` times.
struct Part {
  const char* from;
  size_t bytes;
};

}  // namespace

Work zero(const Tensor& self) {
  if (!self.is_contiguous()) return nullptr;
  const size_t bytes = self.nbytes();
  if (bytes >= kManyBytes) return [data = self.data(), bytes] { host_runtime::zero_fill(data, bytes); };
  return [data = self.data(), bytes] { std::memset(data, 0, bytes); };
}

Work fill(const Tensor& self, const c10::Scalar& value) {
  if (!self.is_contiguous()) return nullptr;
  const auto bits = element_bits(value, self.dtype);
  if (!bits) return nullptr;
  if (*bits == 0) return zero(self);
  return [data = self.data(), n = self.numel(), item = self.itemsize(), bits = *bits] {
    if (item == 1) fill_loop<uint8_t>(data, n, bits);
    if (item == 2) fill_loop<uint16_t>(data, n, bits);
    if (item == 4) fill_loop<uint32_t>(data, n, bits);
    if (item == 8) fill_loop<uint64_t>(data, n, bits);
  };
}

Work copy(const Tensor& to, const Tensor& from) {
  const bool same = to.dtype == from.dtype;
  const CastKernel cast = same ? nullptr : find_cast(from.dtype, to.dtype);
  if (!same && cast == nullptr) return nullptr;
  const auto loops = plan_loops(to, {&from});
  if (!loops || loops->broadcast[1]) return nullptr;
  if (cast != nullptr) {
    return [cast, loops = *loops] { loops.each([&](const auto& at) { cast(at[1], at[0], loops.inner); }); };
  }
  const size_t bytes = static_cast<size_t>(loops->inner) * to.itemsize();
  return [loops = *loops, bytes] { loops.each([&](const auto& at) { std::memmove(at[0], at[1], bytes); }); };
}

Work cat(const TensorList& tensors, int64_t dim, const Tensor& out) {
  if (!out.is_contiguous() || out.dim() == 0) return nullptr;
  if (dim < 0) dim += out.dim();
  int64_t outer = 1, inner = static_cast<int64_t>(out.itemsize());
  for (int64_t i = 0; i < dim; ++i) outer *= out.shape[i];
  for (int64_t i = dim + 1; i < out.dim(); ++i) inner *= out.shape[i];
  c10::SmallVector<Part, 4> parts;
  int64_t total = 0;
  for (const TensorRef& tensor : tensors.tensors) {
    if (!tensor || !tensor->is_contiguous() || tensor->dtype != out.dtype || tensor->dim() != out.dim())
      return nullptr;
    for (int64_t i = 0; i < out.dim(); ++i) {
      if (i != dim && tensor->shape[i] != out.shape[i]) return nullptr;
    }
    total += tensor->shape[dim];
    parts.push_back({tensor->data<char>(), static_cast<size_t>(tensor->shape[dim] * inner)});
  }
  if (total != out.shape[dim]) return nullptr;
  return [parts, outer, to = out.data<char>()] {
    char* at = to;
    for (int64_t i = 0; i < outer; ++i) {
      for (const Part& part : parts) {
        std::memcpy(at, part.from + static_cast<size_t>(i) * part.bytes, part.bytes);
        at += part.bytes;
      }
    }
  };
}

Work gather_rows(const Tensor& table, const Tensor& index, const Tensor& out) {
  const bool wide = index.dtype == c10::ScalarType::Long;
  if (!wide && index.dtype != c10::ScalarType::Int) return nullptr;
  if (table.dim() < 1 || table.dtype != out.dtype || !table.is_contiguous() || !index.is_contiguous() ||
      !out.is_contiguous()) {
    return nullptr;
  }
  const int64_t rows = table.shape[0];
  if (rows == 0) return nullptr;
  const size_t bytes = table.nbytes() / static_cast<size_t>(rows);
  if (static_cast<size_t>(index.numel()) * bytes != out.nbytes()) return nullptr;
  return [from = table.data<char>(), to = out.data<char>(), at = index.data<char>(), n = index.numel(), rows,
          bytes, wide] {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row =
          wide ? reinterpret_cast<const int64_t*>(at)[i] : reinterpret_cast<const int32_t*>(at)[i];
      if (row < 0 || row >= rows) {
        throw std::runtime_error("index " + std::to_string(row) + " at position " + std::to_string(i) +
                                 " is outside of 0.." + std::to_string(rows - 1));
      }
      std::memcpy(to + static_cast<size_t>(i) * bytes, from + static_cast<size_t>(row) * bytes, bytes);
    }
  };
}

}  // namespace aclnn::kernels
