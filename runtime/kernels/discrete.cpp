#include "runtime/kernels/discrete.h"

#include "runtime/kernels/scalar.h"

namespace host_runtime::kernels {
namespace {

/// Calls `body` with a value of the element's C++ type.
template <typename Body>
decltype(auto) visit(Element type, Body&& body) {
  switch (type) {
    case Element::kHalf:
      return body(Half{});
    case Element::kBFloat:
      return body(BFloat{});
    case Element::kInt32:
      return body(int32_t{});
    case Element::kInt64:
      return body(int64_t{});
    case Element::kBool:
      return body(bool{});
    default:
      return body(float{});
  }
}

/// Calls `body(out, a, b, condition)` with the first elements of each run of `nest.width`.
template <typename R, typename T, typename Body>
void each_run(const Discrete& p, const Body& body) {
  if (p.nest.empty) return;
  Cursor<4> at;
  do {
    body(
        static_cast<R*>(p.out) + at.offsets[0], static_cast<const T*>(p.a) + at.offsets[1],
        p.b != nullptr ? static_cast<const T*>(p.b) + at.offsets[2] : reinterpret_cast<const T*>(&p.constant),
        static_cast<const bool*>(p.condition) + at.offsets[3]);
  } while (at.advance(p.nest));
}

/// `factor` as an operand of the operations that have one.
template <typename T>
T factor_of(const Discrete& p) {
  if constexpr (std::is_arithmetic_v<T>) return static_cast<T>(p.factor);
  return T{};
}

/// `Operation::apply(a, b, factor)` on every element; the loops over neighbours stand apart so that they
/// vectorise.
template <typename T, typename R, typename Operation>
void elementwise(const Discrete& p) {
  const T factor = factor_of<T>(p);
  const int64_t width = p.nest.width;
  const auto step = p.nest.step;
  each_run<R, T>(p, [&](R* out, const T* a, const T* b, const bool*) {
    if (step[0] == 1 && step[1] == 1 && step[2] == 1) {
      for (int64_t i = 0; i < width; ++i) out[i] = Operation::apply(a[i], b[i], factor);
    } else if (step[0] == 1 && step[1] == 1 && step[2] == 0) {
      const T repeated = *b;
      for (int64_t i = 0; i < width; ++i) out[i] = Operation::apply(a[i], repeated, factor);
    } else {
      for (int64_t i = 0; i < width; ++i)
        out[i * step[0]] = Operation::apply(a[i * step[1]], b[i * step[2]], factor);
    }
  });
}

template <Arithmetic arithmetic>
struct Calculate {
  // Integers wrap around, which only unsigned ones may.
  template <typename T>
  static T apply(T a, T b, T factor) {
    using U = std::make_unsigned_t<T>;
    if constexpr (arithmetic == Arithmetic::kAdd)
      return static_cast<T>(static_cast<U>(a) + static_cast<U>(b) * static_cast<U>(factor));
    if constexpr (arithmetic == Arithmetic::kMul)
      return static_cast<T>(static_cast<U>(a) * static_cast<U>(b));
    if constexpr (arithmetic == Arithmetic::kMaximum) return a > b ? a : b;
    return a < b ? a : b;
  }
};

template <Comparison comparison>
struct Compare {
  template <typename T>
  static bool apply(T left, T right, T) {
    const auto a = value_of(left);
    const auto b = value_of(right);
    if constexpr (comparison == Comparison::kEqual) return a == b;
    if constexpr (comparison == Comparison::kNotEqual) return a != b;
    if constexpr (comparison == Comparison::kLess) return a < b;
    if constexpr (comparison == Comparison::kLessEqual) return a <= b;
    if constexpr (comparison == Comparison::kGreater) return a > b;
    return a >= b;
  }
};

template <Logic logic>
struct Combine {
  static bool apply(bool a, bool b, bool) {
    if constexpr (logic == Logic::kAnd) return a & b;
    if constexpr (logic == Logic::kOr) return a | b;
    return a ^ b;
  }
};

template <typename T>
void choose(const Discrete& p) {
  const auto step = p.nest.step;
  each_run<T, T>(p, [&](T* out, const T* a, const T* b, const bool* condition) {
    for (int64_t i = 0; i < p.nest.width; ++i)
      out[i * step[0]] = condition[i * step[3]] ? a[i * step[1]] : b[i * step[2]];
  });
}

template <typename T>
void masked_fill(const Discrete& p) {
  const auto step = p.nest.step;
  T value;
  std::memcpy(&value, &p.constant, sizeof(value));
  each_run<T, T>(p, [&](T* out, const T*, const T*, const bool* condition) {
    for (int64_t i = 0; i < p.nest.width; ++i)
      if (condition[i * step[3]]) out[i * step[0]] = value;
  });
}

template <typename From, typename To>
void convert(const Discrete& p) {
  const int64_t width = p.nest.width;
  const auto step = p.nest.step;
  each_run<To, From>(p, [&](To* out, const From* a, const From*, const bool*) {
    if (step[0] == 1 && step[1] == 1) {
      for (int64_t i = 0; i < width; ++i) out[i] = element_of<To>(value_of(a[i]));
    } else {
      for (int64_t i = 0; i < width; ++i) out[i * step[0]] = element_of<To>(value_of(a[i * step[1]]));
    }
  });
}

template <template <Arithmetic> class Operation, Arithmetic arithmetic>
DiscreteKernel on_integers(Element type) {
  if (type == Element::kInt32) return elementwise<int32_t, int32_t, Operation<arithmetic>>;
  if (type == Element::kInt64) return elementwise<int64_t, int64_t, Operation<arithmetic>>;
  return nullptr;
}

template <Comparison comparison>
DiscreteKernel on_any(Element type) {
  return visit(type, [](auto zero) -> DiscreteKernel {
    return elementwise<decltype(zero), bool, Compare<comparison>>;
  });
}

template <typename V>
uint64_t constant_bits(Element type, V value) {
  return visit(type, [&](auto zero) {
    const auto element = element_of<decltype(zero)>(value);
    uint64_t bits = 0;
    std::memcpy(&bits, &element, sizeof(element));
    return bits;
  });
}

}  // namespace

DiscreteKernel arithmetic_kernel(Arithmetic arithmetic, Element type) {
  switch (arithmetic) {
    case Arithmetic::kAdd:
      return on_integers<Calculate, Arithmetic::kAdd>(type);
    case Arithmetic::kMul:
      return on_integers<Calculate, Arithmetic::kMul>(type);
    case Arithmetic::kMaximum:
      return on_integers<Calculate, Arithmetic::kMaximum>(type);
    default:
      return on_integers<Calculate, Arithmetic::kMinimum>(type);
  }
}

DiscreteKernel comparison_kernel(Comparison comparison, Element type) {
  switch (comparison) {
    case Comparison::kEqual:
      return on_any<Comparison::kEqual>(type);
    case Comparison::kNotEqual:
      return on_any<Comparison::kNotEqual>(type);
    case Comparison::kLess:
      return on_any<Comparison::kLess>(type);
    case Comparison::kLessEqual:
      return on_any<Comparison::kLessEqual>(type);
    case Comparison::kGreater:
      return on_any<Comparison::kGreater>(type);
    default:
      return on_any<Comparison::kGreaterEqual>(type);
  }
}

DiscreteKernel logic_kernel(Logic logic) {
  switch (logic) {
    case Logic::kAnd:
      return elementwise<bool, bool, Combine<Logic::kAnd>>;
    case Logic::kOr:
      return elementwise<bool, bool, Combine<Logic::kOr>>;
    default:
      return elementwise<bool, bool, Combine<Logic::kXor>>;
  }
}

DiscreteKernel choice_kernel(int64_t item_bytes) {
  switch (item_bytes) {
    case 1:
      return choose<uint8_t>;
    case 2:
      return choose<uint16_t>;
    case 4:
      return choose<uint32_t>;
    case 8:
      return choose<uint64_t>;
    default:
      return nullptr;
  }
}

DiscreteKernel masked_fill_kernel(int64_t item_bytes) {
  switch (item_bytes) {
    case 1:
      return masked_fill<uint8_t>;
    case 2:
      return masked_fill<uint16_t>;
    case 4:
      return masked_fill<uint32_t>;
    case 8:
      return masked_fill<uint64_t>;
    default:
      return nullptr;
  }
}

DiscreteKernel conversion_kernel(Element from, Element to) {
  return visit(from, [&](auto source) {
    return visit(to,
                 [](auto target) -> DiscreteKernel { return convert<decltype(source), decltype(target)>; });
  });
}

uint64_t constant_of(Element type, double value) { return constant_bits(type, value); }
uint64_t constant_of(Element type, int64_t value) { return constant_bits(type, value); }

}  // namespace host_runtime::kernels
