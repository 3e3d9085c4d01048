#include "runtime/kernels/row_product.h"

#include <cmath>
#include <cstring>

#include "runtime/kernels/isa.h"
#include "runtime/kernels/scalar.h"

namespace host_runtime::kernels {

#define KERNEL_SOURCE "runtime/kernels/row_product.inc"
#include "runtime/kernels/per_isa.h"

GemvKernel gemv_kernel(Type type, bool transposed) {
  return visit(type, [&](auto zero) -> GemvKernel {
    using T = decltype(zero);
    return transposed ? PER_ISA(gemv_transposed<T>) : PER_ISA(gemv_plain<T>);
  });
}

}  // namespace host_runtime::kernels
