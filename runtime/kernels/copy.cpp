#include "runtime/kernels/copy.h"

#include <cstring>

namespace host_runtime::kernels {
namespace {

void nothing(const Copy&) {}

template <typename T>
void copy_runs(const Copy& p) {
  const size_t bytes = static_cast<size_t>(p.nest.width) * sizeof(T);
  Cursor<2> at;
  do {
    std::memmove(static_cast<T*>(p.to) + at.offsets[0], static_cast<const T*>(p.from) + at.offsets[1], bytes);
  } while (at.advance(p.nest));
}

template <typename T>
void copy_elements(const Copy& p) {
  const int64_t width = p.nest.width;
  const auto step = p.nest.step;
  Cursor<2> at;
  do {
    T* to = static_cast<T*>(p.to) + at.offsets[0];
    const T* from = static_cast<const T*>(p.from) + at.offsets[1];
    for (int64_t i = 0; i < width; ++i) to[i * step[0]] = from[i * step[1]];
  } while (at.advance(p.nest));
}

template <typename T>
void fill_elements(const Copy& p) {
  if (p.nest.empty) return;
  const int64_t width = p.nest.width;
  const int64_t step = p.nest.step[0];
  T value;
  std::memcpy(&value, &p.constant, sizeof(value));
  Cursor<2> at;
  do {
    T* to = static_cast<T*>(p.to) + at.offsets[0];
    if (step == 1) {
      for (int64_t i = 0; i < width; ++i) to[i] = value;
    } else {
      for (int64_t i = 0; i < width; ++i) to[i * step] = value;
    }
  } while (at.advance(p.nest));
}

template <typename T>
CopyKernel shaped(const Nest<2>& nest) {
  return nest.steps(0, 1) && nest.steps(1, 1) ? copy_runs<T> : copy_elements<T>;
}

}  // namespace

CopyKernel copy_kernel(int64_t item_bytes, const Nest<2>& nest) {
  if (nest.empty) return nothing;
  switch (item_bytes) {
    case 1:
      return shaped<uint8_t>(nest);
    case 2:
      return shaped<uint16_t>(nest);
    case 4:
      return shaped<uint32_t>(nest);
    case 8:
      return shaped<uint64_t>(nest);
    default:
      return nullptr;
  }
}

CopyKernel fill_kernel(int64_t item_bytes) {
  switch (item_bytes) {
    case 1:
      return fill_elements<uint8_t>;
    case 2:
      return fill_elements<uint16_t>;
    case 4:
      return fill_elements<uint32_t>;
    case 8:
      return fill_elements<uint64_t>;
    default:
      return nullptr;
  }
}

}  // namespace host_runtime::kernels
