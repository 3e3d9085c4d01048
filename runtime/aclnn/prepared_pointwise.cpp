#include <ATen/core/ATen_fwd.h>

#include "runtime/aclnn/prepared.h"
#include "runtime/aclnn/prepared_support.h"

namespace aclnn::prepared {
namespace {

using kernels::Discrete;
using kernels::Element;
using kernels::Pointwise;

bool is_bool(const Tensor& tensor) { return tensor.dtype == c10::ScalarType::Bool; }

/// Float operands of one dtype. `other` null: the immediate.
Work pointwise(Function function, const Tensor& out, const Tensor& self, const Tensor* other, float immediate,
               float factor) {
  const auto type = float_type(out);
  if (!type || self.dtype != out.dtype || (other != nullptr && other->dtype != out.dtype)) return nullptr;
  const auto nest = broadcast_nest({&out, &self, other});
  if (!nest) return nullptr;
  const void* b = other != nullptr ? other->data() : nullptr;
  const Pointwise arguments{out.data(), self.data(), b, immediate, factor, *nest};
  return bind(kernels::pointwise_kernel(function, *type, *nest), arguments);
}

/// Operands in the order out, a, b, condition; nulls where the kernel reads none.
std::optional<Discrete> discrete(const Tensor& out, const Tensor* a, const Tensor* b,
                                 const Tensor* condition) {
  const auto nest = broadcast_nest({&out, a, b, condition});
  if (!nest) return std::nullopt;
  const auto address = [](const Tensor* t) -> const void* { return t != nullptr ? t->data() : nullptr; };
  return Discrete{out.data(), address(a), address(b), address(condition), 1, 0, *nest};
}

Work arithmetic(Arithmetic operation, const Tensor& out, const Tensor& self, const Tensor* other,
                int64_t immediate, int64_t factor) {
  const auto type = element_type(out);
  if (!type || self.dtype != out.dtype || (other != nullptr && other->dtype != out.dtype)) return nullptr;
  auto arguments = discrete(out, &self, other, nullptr);
  if (!arguments) return nullptr;
  arguments->factor = factor;
  arguments->constant = kernels::constant_of(*type, immediate);
  return bind(kernels::arithmetic_kernel(operation, *type), *arguments);
}

bool is_integral(const at::Scalar& value) { return value.isIntegral(/*includeBool=*/false); }

/// One operation on two tensors, for floats and for integers.
Work both(Function function, Arithmetic operation, const Tensor& self, const Tensor& other, const Tensor& out,
          const at::Scalar& factor, bool negate) {
  if (factor.isComplex() || factor.isBoolean()) return nullptr;
  if (float_type(out)) {
    const auto value = factor.to<float>();
    return pointwise(function, out, self, &other, 0.0f, negate ? -value : value);
  }
  if (!is_integral(factor)) return nullptr;
  const auto value = factor.to<int64_t>();
  return arithmetic(operation, out, self, &other, 0, negate ? -value : value);
}

/// The same with a number on the right, which does not decide the dtype.
Work both(Function function, Arithmetic operation, const Tensor& self, const at::Scalar& other,
          const Tensor& out, const at::Scalar& factor, bool negate) {
  if (other.isComplex() || other.isBoolean() || factor.isComplex() || factor.isBoolean()) return nullptr;
  if (float_type(out)) {
    const auto value = factor.to<float>();
    return pointwise(function, out, self, nullptr, static_cast<float>(other.to<double>()),
                     negate ? -value : value);
  }
  if (!is_integral(other) || !is_integral(factor)) return nullptr;
  const auto value = factor.to<int64_t>();
  return arithmetic(operation, out, self, nullptr, other.to<int64_t>(), negate ? -value : value);
}

/// `value` as an element of `type`; nothing when ATen would compute in another dtype.
std::optional<uint64_t> constant(Element type, const at::Scalar& value) {
  if (value.isComplex()) return std::nullopt;
  if (value.isFloatingPoint()) {
    if (type == Element::kInt32 || type == Element::kInt64 || type == Element::kBool) return std::nullopt;
    return kernels::constant_of(type, value.to<double>());
  }
  if (type == Element::kBool && !value.isBoolean()) return std::nullopt;
  const auto number = value.to<int64_t>();
  if (type == Element::kInt32 && number != static_cast<int32_t>(number)) return std::nullopt;
  return kernels::constant_of(type, number);
}

}  // namespace

Work add(const Tensor& self, const Tensor& other, const at::Scalar& alpha, const Tensor& out) {
  return both(Function::kAdd, Arithmetic::kAdd, self, other, out, alpha, false);
}
Work sub(const Tensor& self, const Tensor& other, const at::Scalar& alpha, const Tensor& out) {
  return both(Function::kAdd, Arithmetic::kAdd, self, other, out, alpha, true);
}
Work add(const Tensor& self, const at::Scalar& other, const at::Scalar& alpha, const Tensor& out) {
  return both(Function::kAdd, Arithmetic::kAdd, self, other, out, alpha, false);
}
Work sub(const Tensor& self, const at::Scalar& other, const at::Scalar& alpha, const Tensor& out) {
  return both(Function::kAdd, Arithmetic::kAdd, self, other, out, alpha, true);
}
Work mul(const Tensor& self, const Tensor& other, const Tensor& out) {
  return both(Function::kMul, Arithmetic::kMul, self, other, out, 1, false);
}
Work mul(const Tensor& self, const at::Scalar& other, const Tensor& out) {
  return both(Function::kMul, Arithmetic::kMul, self, other, out, 1, false);
}
Work div(const Tensor& self, const Tensor& other, const Tensor& out) {
  return pointwise(Function::kDiv, out, self, &other, 0.0f, 1.0f);
}
Work div(const Tensor& self, const at::Scalar& other, const Tensor& out) {
  if (other.isComplex()) return nullptr;
  return pointwise(Function::kDiv, out, self, nullptr, static_cast<float>(other.to<double>()), 1.0f);
}
Work maximum(const Tensor& self, const Tensor& other, const Tensor& out) {
  return both(Function::kMaximum, Arithmetic::kMaximum, self, other, out, 1, false);
}
Work minimum(const Tensor& self, const Tensor& other, const Tensor& out) {
  return both(Function::kMinimum, Arithmetic::kMinimum, self, other, out, 1, false);
}

Work unary(Function function, const Tensor& self, const Tensor& out) {
  return pointwise(function, out, self, nullptr, 0.0f, 1.0f);
}

Work pow(const Tensor& self, const at::Scalar& exponent, const Tensor& out) {
  if (exponent.isComplex()) return nullptr;
  const auto power = exponent.to<double>();
  if (power == 2.0) return unary(Function::kSquare, self, out);
  if (power == 3.0) return unary(Function::kCube, self, out);
  if (power == 0.5) return unary(Function::kSqrt, self, out);
  if (power == -0.5) return unary(Function::kReciprocalSqrt, self, out);
  if (power == -1.0) return unary(Function::kReciprocal, self, out);
  return nullptr;
}

Work compare(Comparison comparison, const Tensor& self, const Tensor& other, const Tensor& out) {
  const auto type = element_type(self);
  if (!type || other.dtype != self.dtype || !is_bool(out)) return nullptr;
  const auto arguments = discrete(out, &self, &other, nullptr);
  return arguments ? bind(kernels::comparison_kernel(comparison, *type), *arguments) : nullptr;
}

Work compare(Comparison comparison, const Tensor& self, const at::Scalar& other, const Tensor& out) {
  const auto type = element_type(self);
  if (!type || !is_bool(out)) return nullptr;
  const auto value = constant(*type, other);
  auto arguments = discrete(out, &self, nullptr, nullptr);
  if (!value || !arguments) return nullptr;
  arguments->constant = *value;
  return bind(kernels::comparison_kernel(comparison, *type), *arguments);
}

Work logic(Logic logic, const Tensor& self, const Tensor& other, const Tensor& out) {
  if (!is_bool(self) || !is_bool(other) || !is_bool(out)) return nullptr;
  const auto arguments = discrete(out, &self, &other, nullptr);
  return arguments ? bind(kernels::logic_kernel(logic), *arguments) : nullptr;
}

Work logical_not(const Tensor& self, const Tensor& out) {
  return is_bool(self) ? compare(Comparison::kEqual, self, at::Scalar(false), out) : nullptr;
}

Work where(const Tensor& condition, const Tensor& self, const Tensor& other, const Tensor& out) {
  if (!is_bool(condition) || self.dtype != out.dtype || other.dtype != out.dtype) return nullptr;
  const auto arguments = discrete(out, &self, &other, &condition);
  if (!arguments) return nullptr;
  return bind(kernels::choice_kernel(static_cast<int64_t>(out.itemsize())), *arguments);
}

Work masked_fill(const Tensor& self, const Tensor& mask, const Tensor& value) {
  if (value.numel() != 1) return nullptr;
  return where(mask, value, self, self);
}

Work masked_fill(const Tensor& self, const Tensor& mask, const at::Scalar& value) {
  const auto type = element_type(self);
  if (!type || !is_bool(mask)) return nullptr;
  const auto bits = constant(*type, value);
  auto arguments = discrete(self, &self, nullptr, &mask);
  if (!bits || !arguments) return nullptr;
  arguments->constant = *bits;
  return bind(kernels::masked_fill_kernel(static_cast<int64_t>(self.itemsize())), *arguments);
}

}  // namespace aclnn::prepared
