// Single elements of the 16-bit float types, for loops that are not worth vector code.
#pragma once

#include <cstring>
#include <type_traits>

#include "runtime/kernels/dtype.h"

namespace host_runtime::kernels {

template <typename To, typename From>
inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
inline T value_of(T element) {
  return element;
}
inline float value_of(BFloat element) { return same_bits<float>(static_cast<uint32_t>(element.bits) << 16); }
inline float value_of(Half element) {
  const uint32_t sign = (element.bits & 0x8000u) << 16;
  const float magnitude = same_bits<float>((element.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (element.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return same_bits<float>(sign | same_bits<uint32_t>(magnitude) | special);
}

/// `value` as an element of type T: 16-bit floats round to nearest even, bool is "not zero", integers drop
/// the fraction.
template <typename T, typename V>
inline T element_of(V value) {
  if constexpr (std::is_same_v<T, bool>) {
    return value != V(0);
  } else if constexpr (std::is_same_v<T, BFloat>) {
    const auto bits = same_bits<uint32_t>(static_cast<float>(value));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    const auto bits = same_bits<uint32_t>(static_cast<float>(value));
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
      half = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(((bits >> 16) & 0x8000u) | half)};
  } else {
    return static_cast<T>(value);
  }
}

}  // namespace host_runtime::kernels
