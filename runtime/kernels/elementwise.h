// Prepared elementwise kernels for fp32, bf16, int32 and int64 where the operands have one dtype and simple
// strides. Anything else is declined (an empty Work), and the ATen form of the operator runs.
#pragma once

#include "runtime/aclnn/tensor.h"

namespace aclnn::kernels {

enum class BinaryOperation : uint8_t {
  kAdd,
  kSub,
  kMul,
  kDiv,
  kMaximum,
  kMinimum,
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe
};
enum class UnaryOperation : uint8_t {
  kNeg,
  kAbs,
  kRelu,
  kSilu,
  kSigmoid,
  kExp,
  kSqrt,
  kRsqrt,
  kReciprocal,
  kCos,
  kSin,
  kSquare
};

/// out = operation(a, b), broadcast; for additions and subtractions b is scaled by alpha first.
Work binary(BinaryOperation operation, const Tensor& a, const Tensor& b, const Tensor& out,
            const c10::Scalar& alpha = 1);
/// The same with a number on the right.
Work binary_scalar(BinaryOperation operation, const Tensor& a, const c10::Scalar& b, const Tensor& out,
                   const c10::Scalar& alpha = 1);
Work unary(UnaryOperation operation, const Tensor& x, const Tensor& out);
/// x to the power of 2, 1/2, -1/2 or -1; other exponents are declined.
Work power(const Tensor& x, const c10::Scalar& exponent, const Tensor& out);
/// out = condition ? a : b.
Work where(const Tensor& condition, const Tensor& a, const Tensor& b, const Tensor& out);

}  // namespace aclnn::kernels
