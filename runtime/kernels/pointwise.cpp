#include "runtime/kernels/pointwise.h"

#include <cmath>
#include <cstring>

#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {

#define KERNEL_SOURCE "runtime/kernels/pointwise.inc"
#include "runtime/kernels/per_isa.h"

namespace {

void nothing(const Pointwise&) {}

template <Function function, typename T, typename R>
PointwiseKernel shaped(const Nest<3>& nest) {
  if (nest.empty) return nothing;
  const bool reads_b = function < Function::kCopy;
  const bool dense =
      nest.outer == 0 && nest.steps(0, 1) && nest.steps(1, 1) && (!reads_b || nest.step[2] == 1);
  return dense ? PER_ISA(pointwise_dense<T, R, function>) : PER_ISA(pointwise_strided<T, R, function>);
}

template <Function function>
PointwiseKernel typed(Type type, const Nest<3>& nest) {
  return visit(type, [&](auto zero) { return shaped<function, decltype(zero), decltype(zero)>(nest); });
}

}  // namespace

PointwiseKernel pointwise_kernel(Function function, Type type, const Nest<3>& nest) {
  switch (function) {
#define KERNEL_CASE(name) \
  case Function::name:    \
    return typed<Function::name>(type, nest)
    KERNEL_CASE(kAdd);
    KERNEL_CASE(kMul);
    KERNEL_CASE(kDiv);
    KERNEL_CASE(kReversedDiv);
    KERNEL_CASE(kMaximum);
    KERNEL_CASE(kMinimum);
    KERNEL_CASE(kCopy);
    KERNEL_CASE(kNegative);
    KERNEL_CASE(kAbsolute);
    KERNEL_CASE(kExp);
    KERNEL_CASE(kSigmoid);
    KERNEL_CASE(kSilu);
    KERNEL_CASE(kTanh);
    KERNEL_CASE(kRelu);
    KERNEL_CASE(kSqrt);
    KERNEL_CASE(kReciprocalSqrt);
    KERNEL_CASE(kReciprocal);
    KERNEL_CASE(kSquare);
    KERNEL_CASE(kCube);
    KERNEL_CASE(kSin);
    KERNEL_CASE(kCos);
#undef KERNEL_CASE
  }
  return nullptr;
}

PointwiseKernel cast_kernel(Type from, Type to, const Nest<3>& nest) {
  return visit(from, [&](auto source) {
    return visit(
        to, [&](auto target) { return shaped<Function::kCopy, decltype(source), decltype(target)>(nest); });
  });
}

}  // namespace host_runtime::kernels
