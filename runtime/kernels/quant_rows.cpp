#include "runtime/kernels/quant_rows.h"

#include <cmath>
#include <cstring>

#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {

#define KERNEL_SOURCE "runtime/kernels/quant_rows.inc"
#include "runtime/kernels/per_isa.h"

void quant_rows(const QuantRows& arguments, float* scratch) {
  visit(arguments.type, [&](auto zero) { PER_ISA(quantize_rows<decltype(zero)>)(arguments, scratch); });
}

}  // namespace host_runtime::kernels
