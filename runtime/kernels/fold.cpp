#include "runtime/kernels/fold.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {

#define KERNEL_SOURCE "runtime/kernels/fold.inc"
#include "runtime/kernels/per_isa.h"

namespace {

template <Fold fold>
ReductionKernel typed(Type from, Type to) {
  return visit(from, [&](auto zero) -> ReductionKernel {
    using T = decltype(zero);
    if (from == to) return PER_ISA(fold_rows<T, T, fold>);
    return to == Type::kFloat ? PER_ISA(fold_rows<T, float, fold>) : nullptr;
  });
}

}  // namespace

ReductionKernel reduction_kernel(Fold fold, Type from, Type to) {
  switch (fold) {
    case Fold::kSum:
      return typed<Fold::kSum>(from, to);
    case Fold::kMean:
      return typed<Fold::kMean>(from, to);
    case Fold::kMaximum:
      return typed<Fold::kMaximum>(from, to);
    case Fold::kMinimum:
      return typed<Fold::kMinimum>(from, to);
    case Fold::kArgMax:
      return typed<Fold::kArgMax>(from, to);
    case Fold::kMaxIndex:
      return typed<Fold::kMaxIndex>(from, to);
    default:
      return typed<Fold::kSoftmax>(from, to);
  }
}

}  // namespace host_runtime::kernels
