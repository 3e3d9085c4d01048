// Nested loops over several operands that share one shape, each with strides of its own.
#pragma once

#include <array>
#include <cstdint>

namespace host_runtime::kernels {

/// `width` steps inside, `outer` loops around them (the first one outermost). Strides count elements.
template <int kOperands>
struct Nest {
  static constexpr int kMaxOuter = 7;
  using Offsets = std::array<int64_t, kOperands>;

  int outer = 0;
  bool empty = false;
  int64_t width = 1;
  Offsets step{};
  std::array<int64_t, kMaxOuter> sizes{};
  std::array<Offsets, kMaxOuter> strides{};

  /// Whether the operand moves by `stride` inside.
  bool steps(int operand, int64_t stride) const { return step[operand] == stride || width == 1; }
};

/// Walks the outer loops: `Cursor<N> at; do { ... at.offsets ... } while (at.advance(nest));`
template <int kOperands>
struct Cursor {
  typename Nest<kOperands>::Offsets offsets{};
  std::array<int64_t, Nest<kOperands>::kMaxOuter> index{};

  bool advance(const Nest<kOperands>& nest) {
    for (int loop = nest.outer - 1; loop >= 0; --loop) {
      for (int i = 0; i < kOperands; ++i) offsets[i] += nest.strides[loop][i];
      if (++index[loop] < nest.sizes[loop]) return true;
      index[loop] = 0;
      for (int i = 0; i < kOperands; ++i) offsets[i] -= nest.sizes[loop] * nest.strides[loop][i];
    }
    return false;
  }
};

}  // namespace host_runtime::kernels
