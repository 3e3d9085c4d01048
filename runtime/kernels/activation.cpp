#include "runtime/kernels/activation.h"

#include <cmath>
#include <cstring>

#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {

#define KERNEL_HAS_DOTS
#define KERNEL_SOURCE "runtime/kernels/activation.inc"
#include "runtime/kernels/per_isa.h"

void gated_activation(const GatedActivation& arguments) {
  visit(arguments.type, [&](auto zero) {
    using T = decltype(zero);
    switch (arguments.gate) {
      case Gate::kSilu:
        return PER_ISA_OR_DOTS(gated_rows<T, Gate::kSilu>)(arguments);
      case Gate::kGeluErf:
        return PER_ISA_OR_DOTS(gated_rows<T, Gate::kGeluErf>)(arguments);
      default:
        return PER_ISA_OR_DOTS(gated_rows<T, Gate::kGeluTanh>)(arguments);
    }
  });
}

}  // namespace host_runtime::kernels
