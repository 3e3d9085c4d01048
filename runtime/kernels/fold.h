// Reductions over rows of contiguous elements, accumulated in float.
#pragma once

#include "runtime/kernels/dtype.h"
#include "runtime/kernels/nest.h"

namespace host_runtime::kernels {

/// The nest runs over the rows; its operands are out (elements), in (elements), and indices.
struct Reduction {
  void* out;
  const void* in;
  int64_t* indices;  ///< of the largest element, or nullptr
  int64_t width;     ///< elements of a row
  Nest<3> nest;
};
using ReductionKernel = void (*)(const Reduction&);

enum class Fold : uint8_t {
  kSum,
  kMean,
  kMaximum,  ///< NaN if there is one
  kMinimum,
  kArgMax,    ///< indices only; the first of equal elements, the first NaN before all
  kMaxIndex,  ///< both
  kSoftmax,   ///< out is a row
};

/// `from` and `to` are the element types of in and out; `to` is `from` or kFloat.
ReductionKernel reduction_kernel(Fold fold, Type from, Type to);

}  // namespace host_runtime::kernels
