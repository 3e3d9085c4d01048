#include "runtime/kernels/index.h"

#include <stdexcept>
#include <string>

namespace host_runtime::kernels {
namespace {

/// The position stored `offset` elements into the index, which is the `ordinal`th that is read.
int64_t position_at(const Positions& positions, int64_t offset, int64_t ordinal) {
  const int64_t given = positions.wide ? static_cast<const int64_t*>(positions.values)[offset]
                                       : static_cast<const int32_t*>(positions.values)[offset];
  const int64_t position = given < 0 && positions.negative ? given + positions.limit : given;
  if (position < 0 || position >= positions.limit) {
    throw std::out_of_range("index " + std::to_string(given) + " at position " + std::to_string(ordinal) +
                            " is outside of 0.." + std::to_string(positions.limit - 1));
  }
  return position;
}

template <typename T, bool scatters>
void move_elements(const ElementMove& p) {
  if (p.nest.empty) return;
  const auto step = p.nest.step;
  Cursor<3> at;
  do {
    T* to = static_cast<T*>(p.to) + at.offsets[0];
    const T* from = static_cast<const T*>(p.from) + at.offsets[1];
    for (int64_t i = 0; i < p.nest.width; ++i) {
      const int64_t place = at.offsets[2] + i * step[2];
      const int64_t shift = p.stride * position_at(p.positions, place, place);
      to[i * step[0] + (scatters ? shift : 0)] = from[i * step[1] + (scatters ? 0 : shift)];
    }
  } while (at.advance(p.nest));
}

template <typename T>
ElementMoveKernel direction(bool scatters) {
  return scatters ? move_elements<T, true> : move_elements<T, false>;
}

}  // namespace

void move_slices(const SliceMove& p) {
  Copy slice = p.slice;
  auto* to = static_cast<char*>(p.slice.to);
  const auto* from = static_cast<const char*>(p.slice.from);
  for (int64_t k = 0; k < p.count; ++k) {
    const int64_t position = position_at(p.positions, k * p.position_step, k);
    slice.to = to + (p.writes_at_positions ? position : k) * p.to_stride;
    slice.from = from + (p.writes_at_positions ? k : position) * p.from_stride;
    p.kernel(slice);
  }
}

ElementMoveKernel element_move_kernel(int64_t item_bytes, bool scatters) {
  switch (item_bytes) {
    case 1:
      return direction<uint8_t>(scatters);
    case 2:
      return direction<uint16_t>(scatters);
    case 4:
      return direction<uint32_t>(scatters);
    case 8:
      return direction<uint64_t>(scatters);
    default:
      return nullptr;
  }
}

}  // namespace host_runtime::kernels
