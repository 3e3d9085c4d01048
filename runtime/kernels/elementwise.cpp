#include "runtime/kernels/elementwise.h"

#include <cmath>

#include "runtime/kernels/loops.h"
#include "runtime/kernels/simd.h"

namespace aclnn::kernels {
namespace {

/// Where the inner run of an operand is a single element.
enum class Shape : uint8_t { kBoth, kRightIsOne, kLeftIsOne };

using BinaryKernel = void (*)(const void* a, const void* b, void* out, int64_t n, Shape shape, double alpha);
using UnaryKernel = void (*)(const void* x, void* out, int64_t n);

struct Add {
  template <typename T>
  static INLINE_KERNEL T apply(T a, T b, T alpha) {
    return a + alpha * b;
  }
};
struct Sub {
  template <typename T>
  static INLINE_KERNEL T apply(T a, T b, T alpha) {
    return a - alpha * b;
  }
};
struct Mul {
  template <typename T>
  static INLINE_KERNEL T apply(T a, T b, T) {
    return a * b;
  }
};
struct Div {
  template <typename T>
  static INLINE_KERNEL T apply(T a, T b, T) {
    return a / b;
  }
};
// A NaN on either side gives NaN.
struct Maximum {
  template <typename T>
  static INLINE_KERNEL T apply(T a, T b, T) {
    return a != a ? a : (a > b ? a : b);
  }
};
struct Minimum {
  template <typename T>
  static INLINE_KERNEL T apply(T a, T b, T) {
    return a != a ? a : (a < b ? a : b);
  }
};
#define DEFINE_COMPARISON(Name, symbol)               \
  struct Name {                                       \
    template <typename T>                             \
    static INLINE_KERNEL uint8_t apply(T a, T b, T) { \
      return a symbol b;                              \
    }                                                 \
  }
DEFINE_COMPARISON(Eq, ==);
DEFINE_COMPARISON(Ne, !=);
DEFINE_COMPARISON(Lt, <);
DEFINE_COMPARISON(Le, <=);
DEFINE_COMPARISON(Gt, >);
DEFINE_COMPARISON(Ge, >=);
#undef DEFINE_COMPARISON

template <typename Operation, typename In, typename Out>
INLINE_KERNEL void binary_loop(const void* left, const void* right, void* result, int64_t n, Shape shape,
                               double scale) {
  using Value = typename In::Value;
  const auto* a = static_cast<const typename In::Stored*>(left);
  const auto* b = static_cast<const typename In::Stored*>(right);
  auto* out = static_cast<typename Out::Stored*>(result);
  const auto alpha = static_cast<Value>(scale);
  if (shape == Shape::kBoth) {
    for (int64_t i = 0; i < n; ++i)
      out[i] = Out::store(Operation::apply(In::load(a[i]), In::load(b[i]), alpha));
  } else if (shape == Shape::kRightIsOne) {
    const Value one = In::load(b[0]);
    for (int64_t i = 0; i < n; ++i) out[i] = Out::store(Operation::apply(In::load(a[i]), one, alpha));
  } else {
    const Value one = In::load(a[0]);
    for (int64_t i = 0; i < n; ++i) out[i] = Out::store(Operation::apply(one, In::load(b[i]), alpha));
  }
}

#define DEFINE_BINARY(Operation, In, Out)                                                         \
  FOR_EACH_ISA void Operation##_##In(const void* a, const void* b, void* out, int64_t n, Shape s, \
                                     double scale) {                                              \
    binary_loop<Operation, In, Out>(a, b, out, n, s, scale);                                      \
  }
#define DEFINE_ARITHMETIC(Operation)   \
  DEFINE_BINARY(Operation, F32, F32)   \
  DEFINE_BINARY(Operation, BF16, BF16) \
  DEFINE_BINARY(Operation, I32, I32)   \
  DEFINE_BINARY(Operation, I64, I64)
using Flag = Whole<uint8_t>;
#define DEFINE_COMPARING(Operation)    \
  DEFINE_BINARY(Operation, F32, Flag)  \
  DEFINE_BINARY(Operation, BF16, Flag) \
  DEFINE_BINARY(Operation, I32, Flag)  \
  DEFINE_BINARY(Operation, I64, Flag)
DEFINE_ARITHMETIC(Add)
DEFINE_ARITHMETIC(Sub)
DEFINE_ARITHMETIC(Mul)
DEFINE_ARITHMETIC(Maximum)
DEFINE_ARITHMETIC(Minimum)
DEFINE_BINARY(Div, F32, F32)
DEFINE_BINARY(Div, BF16, BF16)
DEFINE_COMPARING(Eq)
DEFINE_COMPARING(Ne)
DEFINE_COMPARING(Lt)
DEFINE_COMPARING(Le)
DEFINE_COMPARING(Gt)
DEFINE_COMPARING(Ge)

struct Row {
  BinaryKernel f32, bf16, i32, i64;
};
#define ALL_FOUR(Operation) {Operation##_F32, Operation##_BF16, Operation##_I32, Operation##_I64}

/// Kernels in the order of BinaryOperation.
const Row kBinary[] = {
    ALL_FOUR(Add),     ALL_FOUR(Sub),     ALL_FOUR(Mul), {Div_F32, Div_BF16, nullptr, nullptr},
    ALL_FOUR(Maximum), ALL_FOUR(Minimum), ALL_FOUR(Eq),  ALL_FOUR(Ne),
    ALL_FOUR(Lt),      ALL_FOUR(Le),      ALL_FOUR(Gt),  ALL_FOUR(Ge)};

bool compares(BinaryOperation operation) { return operation >= BinaryOperation::kEq; }

BinaryKernel find_binary(BinaryOperation operation, c10::ScalarType in, c10::ScalarType out) {
  if (out != (compares(operation) ? c10::ScalarType::Bool : in)) return nullptr;
  const Row& row = kBinary[static_cast<size_t>(operation)];
  switch (in) {
    case c10::ScalarType::Float:
      return row.f32;
    case c10::ScalarType::BFloat16:
      return row.bf16;
    case c10::ScalarType::Int:
      return row.i32;
    case c10::ScalarType::Long:
      return row.i64;
    default:
      return nullptr;
  }
}

/// A number that an element of the dtype holds exactly as ATen would use it: bf16 meets numbers in fp32,
/// unrounded.
bool fits(const c10::Scalar& value, c10::ScalarType dtype) {
  if (value.isComplex()) return false;
  if (dtype == c10::ScalarType::BFloat16) return widen(narrow(value.to<float>())) == value.to<float>();
  if (c10::isFloatingType(dtype)) return true;
  if (!value.isIntegral(/*includeBool=*/true)) return false;
  const int64_t v = value.toLong();
  return dtype == c10::ScalarType::Long || v == static_cast<int32_t>(v);
}

struct Neg {
  static INLINE_KERNEL float apply(float x) { return -x; }
};
struct Abs {
  static INLINE_KERNEL float apply(float x) { return __builtin_fabsf(x); }
};
struct Relu {
  static INLINE_KERNEL float apply(float x) { return x < 0 ? 0.F : x; }
};
struct Sigmoid {
  static INLINE_KERNEL float apply(float x) { return 1.F / (1.F + exponential(-x)); }
};
struct Silu {
  static INLINE_KERNEL float apply(float x) { return x / (1.F + exponential(-x)); }
};
struct Exp {
  static INLINE_KERNEL float apply(float x) { return exponential(x); }
};
struct Sqrt {
  static INLINE_KERNEL float apply(float x) { return __builtin_sqrtf(x); }
};
struct Rsqrt {
  static INLINE_KERNEL float apply(float x) { return 1.F / __builtin_sqrtf(x); }
};
struct Reciprocal {
  static INLINE_KERNEL float apply(float x) { return 1.F / x; }
};
struct Cos {
  static INLINE_KERNEL float apply(float x) { return std::cos(x); }
};
struct Sin {
  static INLINE_KERNEL float apply(float x) { return std::sin(x); }
};
struct Square {
  static INLINE_KERNEL float apply(float x) { return x * x; }
};

template <typename Operation, typename Dtype>
INLINE_KERNEL void unary_loop(const void* from, void* to, int64_t n) {
  const auto* x = static_cast<const typename Dtype::Stored*>(from);
  auto* out = static_cast<typename Dtype::Stored*>(to);
  for (int64_t i = 0; i < n; ++i) out[i] = Dtype::store(Operation::apply(Dtype::load(x[i])));
}
#define DEFINE_UNARY(Operation)                                             \
  FOR_EACH_ISA void Operation##_F32(const void* x, void* out, int64_t n) {  \
    unary_loop<Operation, F32>(x, out, n);                                  \
  }                                                                         \
  FOR_EACH_ISA void Operation##_BF16(const void* x, void* out, int64_t n) { \
    unary_loop<Operation, BF16>(x, out, n);                                 \
  }
DEFINE_UNARY(Neg)
DEFINE_UNARY(Abs)
DEFINE_UNARY(Relu)
DEFINE_UNARY(Silu)
DEFINE_UNARY(Sigmoid)
DEFINE_UNARY(Exp)
DEFINE_UNARY(Sqrt)
DEFINE_UNARY(Rsqrt)
DEFINE_UNARY(Reciprocal)
DEFINE_UNARY(Cos)
DEFINE_UNARY(Sin)
DEFINE_UNARY(Square)

struct UnaryRow {
  UnaryKernel f32, bf16;
};
#define BOTH(Operation) {Operation##_F32, Operation##_BF16}
/// Kernels in the order of UnaryOperation.
const UnaryRow kUnary[] = {BOTH(Neg),        BOTH(Abs), BOTH(Relu), BOTH(Silu),
                           BOTH(Sigmoid),    BOTH(Exp), BOTH(Sqrt), BOTH(Rsqrt),
                           BOTH(Reciprocal), BOTH(Cos), BOTH(Sin),  BOTH(Square)};

/// A number stored as an element of `dtype`, for kernels that take pointers.
std::array<char, 8> as_element(const c10::Scalar& value, c10::ScalarType dtype) {
  std::array<char, 8> bytes{};
  const auto put = [&](auto element) { std::memcpy(bytes.data(), &element, sizeof(element)); };
  if (dtype == c10::ScalarType::Float) put(value.to<float>());
  if (dtype == c10::ScalarType::BFloat16) put(narrow(value.to<float>()));
  if (dtype == c10::ScalarType::Int) put(value.to<int32_t>());
  if (dtype == c10::ScalarType::Long) put(value.to<int64_t>());
  return bytes;
}

template <typename Stored>
INLINE_KERNEL void select_loop(const uint8_t* condition, const void* a, const void* b, void* out, int64_t n,
                               const std::array<bool, kMaxOperands>& one) {
  const auto* x = static_cast<const Stored*>(a);
  const auto* y = static_cast<const Stored*>(b);
  auto* result = static_cast<Stored*>(out);
  const int64_t c_step = !one[1], x_step = !one[2], y_step = !one[3];
  if (c_step + x_step + y_step == 3) {
    for (int64_t i = 0; i < n; ++i) result[i] = condition[i] ? x[i] : y[i];
  } else {
    for (int64_t i = 0; i < n; ++i) result[i] = condition[i * c_step] ? x[i * x_step] : y[i * y_step];
  }
}

}  // namespace

Work binary(BinaryOperation operation, const Tensor& a, const Tensor& b, const Tensor& out,
            const c10::Scalar& alpha) {
  if (a.dtype != b.dtype || !fits(alpha, a.dtype)) return nullptr;
  const BinaryKernel kernel = find_binary(operation, a.dtype, out.dtype);
  if (kernel == nullptr) return nullptr;
  const auto loops = plan_loops(out, {&a, &b});
  if (!loops || (loops->broadcast[1] && loops->broadcast[2])) return nullptr;
  const Shape shape =
      loops->broadcast[2] ? Shape::kRightIsOne : (loops->broadcast[1] ? Shape::kLeftIsOne : Shape::kBoth);
  const double scale = alpha.toDouble();
  if (loops->outer == 0) {
    return [kernel, x = loops->base[1], y = loops->base[2], result = loops->base[0], n = loops->inner, shape,
            scale] { kernel(x, y, result, n, shape, scale); };
  }
  return [kernel, loops = *loops, shape, scale] {
    loops.each([&](const auto& at) { kernel(at[1], at[2], at[0], loops.inner, shape, scale); });
  };
}

Work binary_scalar(BinaryOperation operation, const Tensor& a, const c10::Scalar& b, const Tensor& out,
                   const c10::Scalar& alpha) {
  if (!fits(b, a.dtype) || !fits(alpha, a.dtype)) return nullptr;
  const BinaryKernel kernel = find_binary(operation, a.dtype, out.dtype);
  if (kernel == nullptr) return nullptr;
  const auto loops = plan_loops(out, {&a});
  if (!loops || loops->broadcast[1]) return nullptr;
  const auto element = as_element(b, a.dtype);
  const double scale = alpha.toDouble();
  return [kernel, loops = *loops, element, scale] {
    loops.each([&](const auto& at) {
      kernel(at[1], element.data(), at[0], loops.inner, Shape::kRightIsOne, scale);
    });
  };
}

Work unary(UnaryOperation operation, const Tensor& x, const Tensor& out) {
  if (x.dtype != out.dtype) return nullptr;
  const UnaryRow& row = kUnary[static_cast<size_t>(operation)];
  UnaryKernel kernel = nullptr;
  if (x.dtype == c10::ScalarType::Float) kernel = row.f32;
  if (x.dtype == c10::ScalarType::BFloat16) kernel = row.bf16;
  if (kernel == nullptr) return nullptr;
  const auto loops = plan_loops(out, {&x});
  if (!loops || loops->broadcast[1]) return nullptr;
  return [kernel, loops = *loops] { loops.each([&](const auto& at) { kernel(at[1], at[0], loops.inner); }); };
}

Work power(const Tensor& x, const c10::Scalar& exponent, const Tensor& out) {
  if (exponent.isComplex()) return nullptr;
  const double e = exponent.toDouble();
  if (e == 2) return unary(UnaryOperation::kSquare, x, out);
  if (e == 0.5) return unary(UnaryOperation::kSqrt, x, out);
  if (e == -0.5) return unary(UnaryOperation::kRsqrt, x, out);
  if (e == -1) return unary(UnaryOperation::kReciprocal, x, out);
  return nullptr;
}

Work where(const Tensor& condition, const Tensor& a, const Tensor& b, const Tensor& out) {
  if (condition.dtype != c10::ScalarType::Bool || a.dtype != b.dtype || a.dtype != out.dtype) return nullptr;
  const size_t item = out.itemsize();
  if (item != 2 && item != 4 && item != 8) return nullptr;
  const auto loops = plan_loops(out, {&condition, &a, &b});
  if (!loops) return nullptr;
  return [loops = *loops, item] {
    loops.each([&](const auto& at) {
      const auto* flags = reinterpret_cast<const uint8_t*>(at[1]);
      if (item == 2) select_loop<uint16_t>(flags, at[2], at[3], at[0], loops.inner, loops.broadcast);
      if (item == 4) select_loop<uint32_t>(flags, at[2], at[3], at[0], loops.inner, loops.broadcast);
      if (item == 8) select_loop<uint64_t>(flags, at[2], at[3], at[0], loops.inner, loops.broadcast);
    });
  };
}

}  // namespace aclnn::kernels
