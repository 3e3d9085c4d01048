// Moving slices and elements to or from positions that a tensor names.
#pragma once

#include "runtime/kernels/copy.h"
#include "runtime/kernels/nest.h"

namespace host_runtime::kernels {

/// Positions along one dimension, checked at run time.
struct Positions {
  const void* values;
  bool wide;      ///< int64, else int32
  bool negative;  ///< whether negative ones count from the end
  int64_t limit;  ///< size of the dimension
};

/// Copies one slice for each of `count` positions: position k reads from (or, with `writes_at_positions`,
/// writes to) its slice, the other side moves by one slice a step. Strides in bytes.
struct SliceMove {
  Copy slice;
  CopyKernel kernel;
  Positions positions;
  int64_t position_step;  ///< elements between positions
  int64_t count;
  int64_t to_stride;
  int64_t from_stride;
  bool writes_at_positions;
};
/// Throws std::out_of_range for a position outside the dimension; slices before it are done by then.
void move_slices(const SliceMove& arguments);

/// One element for each element of the index. The nest's operands are to, from, index (elements); the side
/// that positions apply to moves by `stride` elements a position.
struct ElementMove {
  void* to;
  const void* from;
  Positions positions;
  int64_t stride;
  Nest<3> nest;
};
using ElementMoveKernel = void (*)(const ElementMove&);
/// `scatters`: positions apply to `to`, else to `from`. Elements of 1, 2, 4 or 8 bytes, else null.
ElementMoveKernel element_move_kernel(int64_t item_bytes, bool scatters);

}  // namespace host_runtime::kernels
