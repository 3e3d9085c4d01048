#include "runtime/kernels/activation.h"

#include "runtime/kernels/simd.h"

namespace host_runtime::kernels {
namespace {

KERNEL_INLINE Lanes gelu_erf(Lanes a) {
  float values[kLanes];
  store(values, a);
  for (float& value : values) value = 0.5f * value * (1.0f + std::erf(value * 0.70710678f));
  return load(values);
}

template <Gate gate>
KERNEL_INLINE Lanes activate(Lanes a) {
  if constexpr (gate == Gate::kSilu) {
    return a * sigmoid(a);
  } else if constexpr (gate == Gate::kGeluErf) {
    return gelu_erf(a);
  } else {
    const Lanes inner =
        (a + a * a * a * 0.044715f) * 1.5957691216f;  // 2 sqrt(2/pi): tanh(z) = 2 sigmoid(2z) - 1
    return a * sigmoid(inner);
  }
}

template <typename T, Gate gate>
KERNEL_CLONES void gated_rows(const GatedActivation& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* activated = static_cast<const T*>(a.activated) + row * a.input_row_stride;
    const T* linear = static_cast<const T*>(a.linear) + row * a.input_row_stride;
    T* y = static_cast<T*>(a.y) + row * a.output_row_stride;
    T* gated = a.gated == nullptr ? nullptr : static_cast<T*>(a.gated) + row * a.output_row_stride;
    for (int64_t i = 0; i < a.width; i += kLanes) {
      const int64_t count = lanes_at(i, a.width);
      const Lanes gate_value = activate<gate>(load_at(activated, i, count));
      store_at(y, i, gate_value * load_at(linear, i, count), count);
      if (gated != nullptr) store_at(gated, i, gate_value, count);
    }
  }
}

}  // namespace

void gated_activation(const GatedActivation& arguments) {
  visit(arguments.type, [&](auto zero) {
    using T = decltype(zero);
    switch (arguments.gate) {
      case Gate::kSilu:
        return gated_rows<T, Gate::kSilu>(arguments);
      case Gate::kGeluErf:
        return gated_rows<T, Gate::kGeluErf>(arguments);
      default:
        return gated_rows<T, Gate::kGeluTanh>(arguments);
    }
  });
}

}  // namespace host_runtime::kernels
