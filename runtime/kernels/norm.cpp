#include "runtime/kernels/norm.h"

#include <algorithm>
#include <cmath>

#include "runtime/kernels/simd.h"

namespace host_runtime::kernels {
namespace {

/// Adds x and residual as the element type does, keeps the sum where it is wanted, and returns the sum of
/// squares.
template <typename T>
KERNEL_INLINE float square_sum(const T* x, const T* residual, T* sum_out, int64_t width) {
  Lanes squares{};
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t count = lanes_at(i, width);
    Lanes value = load_at(x, i, count);
    if (residual != nullptr) {
      value = round_to<T>(value + load_at(residual, i, count));
      if (sum_out != nullptr) store_at(sum_out, i, value, count);
    }
    squares += value * value;
  }
  return sum(squares);
}

template <typename T, typename Gamma>
KERNEL_CLONES void rms_norm_rows(const RmsNorm& a) {
  const auto* gamma = static_cast<const Gamma*>(a.gamma);
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + a.x_rows.offset(row);
    const T* residual =
        a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + a.residual_rows.offset(row);
    T* sum_out = a.sum == nullptr ? nullptr : static_cast<T*>(a.sum) + a.sum_rows.offset(row);
    T* y = static_cast<T*>(a.y) + a.y_rows.offset(row);
    const float mean = square_sum(x, residual, sum_out, a.width) / static_cast<float>(a.width);
    const float rstd = 1.0f / std::sqrt(mean + a.epsilon);
    if (a.rstd != nullptr) a.rstd[row] = rstd;
    // With a sum to keep, it already holds x + residual; y may share its memory with x or residual.
    const T* source = sum_out != nullptr ? sum_out : x;
    const T* addend = sum_out != nullptr ? nullptr : residual;
    for (int64_t i = 0; i < a.width; i += kLanes) {
      const int64_t count = lanes_at(i, a.width);
      Lanes value = load_at(source, i, count);
      if (addend != nullptr) value = round_to<T>(value + load_at(addend, i, count));
      value *= rstd;
      if (a.round_before_gamma) value = round_to<T>(value);
      value *= load_at(gamma, i, count) + a.gamma_offset;
      if (a.y_float != nullptr) store_at(a.y_float + row * a.width, i, round_to<T>(value), count);
      store_at(y, i, value, count);
    }
  }
}

}  // namespace

void rms_norm(const RmsNorm& arguments) {
  visit(arguments.type, [&](auto zero) {
    using T = decltype(zero);
    if (arguments.gamma_type == arguments.type) {
      rms_norm_rows<T, T>(arguments);
    } else {
      rms_norm_rows<T, float>(arguments);
    }
  });
}

}  // namespace host_runtime::kernels
