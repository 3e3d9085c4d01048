// Elementwise work that is not float arithmetic: integers, comparisons, logic, choice, and casts from and to
// integers.
#pragma once

#include "runtime/kernels/dtype.h"
#include "runtime/kernels/nest.h"

namespace host_runtime::kernels {

/// Element types; bool lies in memory as a byte 0 or 1.
enum class Element : uint8_t { kFloat, kHalf, kBFloat, kInt32, kInt64, kBool };

/// Operands in the nest's order: out, a, b, condition. Where `b` is null, `constant` (an element of b's type)
/// stands for it.
struct Discrete {
  void* out;
  const void* a;
  const void* b;
  const void* condition;
  int64_t factor;
  uint64_t constant;
  Nest<4> nest;
};
using DiscreteKernel = void (*)(const Discrete&);

/// On int32 and int64.
enum class Arithmetic : uint8_t { kAdd /* a + factor * b */, kMul, kMaximum, kMinimum };
/// Results are bool.
enum class Comparison : uint8_t { kEqual, kNotEqual, kLess, kLessEqual, kGreater, kGreaterEqual };
/// On bool.
enum class Logic : uint8_t { kAnd, kOr, kXor };

/// Null where the type does not fit the operation.
DiscreteKernel arithmetic_kernel(Arithmetic arithmetic, Element type);
DiscreteKernel comparison_kernel(Comparison comparison, Element type);
DiscreteKernel logic_kernel(Logic logic);
/// condition ? a : b on elements of 1, 2, 4 or 8 bytes.
DiscreteKernel choice_kernel(int64_t item_bytes);
/// out = constant where the condition holds; the rest of out stays.
DiscreteKernel masked_fill_kernel(int64_t item_bytes);
/// a as an element of another type.
DiscreteKernel conversion_kernel(Element from, Element to);

/// `value` as the bits of an element, for `constant`.
uint64_t constant_of(Element type, double value);
uint64_t constant_of(Element type, int64_t value);

}  // namespace host_runtime::kernels
