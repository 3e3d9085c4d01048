// Copying elements of any size between layouts, and filling.
#pragma once

#include "runtime/kernels/nest.h"

namespace host_runtime::kernels {

/// Operands in the nest's order: to, from. A fill has a null `from` and writes `constant`.
struct Copy {
  void* to;
  const void* from;
  uint64_t constant;
  Nest<2> nest;
};
using CopyKernel = void (*)(const Copy&);

/// For elements of 1, 2, 4 or 8 bytes; null for others.
CopyKernel copy_kernel(int64_t item_bytes, const Nest<2>& nest);
CopyKernel fill_kernel(int64_t item_bytes);

}  // namespace host_runtime::kernels
