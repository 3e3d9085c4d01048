// Elementwise arithmetic on float32, float16 and bfloat16: computed in float, rounded once to the result's
// type, as ATen does.
#pragma once

#include "runtime/kernels/dtype.h"
#include "runtime/kernels/nest.h"

namespace host_runtime::kernels {

/// Operands in the nest's order: out, a, b. Where `b` is null, `immediate` (not rounded to the element type)
/// stands for it.
struct Pointwise {
  void* out;
  const void* a;
  const void* b;
  float immediate;
  float factor;
  Nest<3> nest;
};
using PointwiseKernel = void (*)(const Pointwise&);

enum class Function : uint8_t {
  kAdd,  ///< a + factor * b
  kMul,
  kDiv,
  kReversedDiv,  ///< b / a
  kMaximum,      ///< NaN if either is
  kMinimum,
  kCopy,  ///< a; the functions from here on ignore b
  kNegative,
  kAbsolute,
  kExp,
  kSigmoid,
  kSilu,
  kTanh,
  kRelu,
  kSqrt,
  kReciprocalSqrt,
  kReciprocal,
  kSquare,
  kCube,
  kSin,
  kCos,
};

/// The kernel for this machine: `type` is that of a, b and out.
PointwiseKernel pointwise_kernel(Function function, Type type, const Nest<3>& nest);
/// a converted to another float type.
PointwiseKernel cast_kernel(Type from, Type to, const Nest<3>& nest);

}  // namespace host_runtime::kernels
