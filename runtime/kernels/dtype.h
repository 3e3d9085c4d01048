// The element types the kernels read and write, and the dispatch from a run-time type to a template.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace host_runtime::kernels {

/// IEEE binary16 and bfloat16 as raw bits: the kernels convert them lane-wise (simd.h).
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

enum class Type : uint8_t { kFloat, kHalf, kBFloat };

/// Calls `body` with a value-initialised float, Half or BFloat: `visit(type, [&](auto zero) { using T = ...
/// })`.
template <typename Body>
decltype(auto) visit(Type type, Body&& body) {
  switch (type) {
    case Type::kHalf:
      return body(Half{});
    case Type::kBFloat:
      return body(BFloat{});
    default:
      return body(float{});
  }
}

constexpr int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

}  // namespace host_runtime::kernels
