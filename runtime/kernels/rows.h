// A tensor seen as rows: its last dimensions are one contiguous run of elements, the others have any strides.
#pragma once

#include <array>
#include <cstdint>

namespace host_runtime::kernels {

/// The outer dimensions of a tensor, in elements. Dimensions that lie one behind the other are merged, so a
/// contiguous tensor has at most one.
struct Rows {
  static constexpr int kMaxDims = 8;
  int dims = 0;
  std::array<int64_t, kMaxDims> sizes{};
  std::array<int64_t, kMaxDims> strides{};

  int64_t count() const {
    int64_t rows = 1;
    for (int i = 0; i < dims; ++i) rows *= sizes[i];
    return rows;
  }

  /// Appends the next inner dimension.
  void add(int64_t size, int64_t stride) {
    if (size == 1) return;
    if (dims > 0 && strides[dims - 1] == size * stride) {
      sizes[dims - 1] *= size;
      strides[dims - 1] = stride;
      return;
    }
    sizes[dims] = size;
    strides[dims] = stride;
    ++dims;
  }

  static Rows contiguous(int64_t rows, int64_t width) {
    Rows result;
    result.add(rows, width);
    return result;
  }

  /// Offset in elements of row `index` in row-major order of the outer dimensions.
  int64_t offset(int64_t index) const {
    if (dims == 1) return index * strides[0];
    int64_t offset = 0;
    for (int i = dims - 1; i >= 0; --i) {
      offset += (index % sizes[i]) * strides[i];
      index /= sizes[i];
    }
    return offset;
  }
};

}  // namespace host_runtime::kernels
