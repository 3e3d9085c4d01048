#include "runtime/kernels/norm.h"

#include <algorithm>
#include <cmath>

#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {

#define KERNEL_HAS_DOTS
#define KERNEL_SOURCE "runtime/kernels/norm.inc"
#include "runtime/kernels/per_isa.h"

void rms_norm(const RmsNorm& arguments) {
  visit(arguments.type, [&](auto zero) {
    using T = decltype(zero);
    if (arguments.gamma_type == arguments.type) {
      PER_ISA_OR_DOTS(rms_norm_rows<T, T>)(arguments);
    } else {
      PER_ISA_OR_DOTS(rms_norm_rows<T, float>)(arguments);
    }
  });
}

void layer_norm(const LayerNorm& arguments) {
  visit(arguments.type, [&](auto zero) {
    using T = decltype(zero);
    if (arguments.gamma_type == arguments.type) {
      PER_ISA_OR_DOTS(layer_norm_rows<T, T>)(arguments);
    } else {
      PER_ISA_OR_DOTS(layer_norm_rows<T, float>)(arguments);
    }
  });
}

}  // namespace host_runtime::kernels
