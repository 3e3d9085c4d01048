// Sharing out the columns of a product among ATen's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "runtime/acl/task.h"

namespace host_runtime::kernels {

/// Weights below which sharing does not pay: it saves tens of microseconds, and a thread that has to wait for
/// its processor costs hundreds.
constexpr int64_t kSharedWeights = int64_t{1} << 20;

/// body(begin, end) over all columns of a matrix of `depth` rows; ranges begin at multiples of `block`.
template <typename Body>
void share_columns(int64_t depth, int64_t columns, int64_t block, const Body& body) {
  if (depth * columns < kSharedWeights || host_runtime::runs_beside_others()) return body(0, columns);
  at::parallel_for(0, (columns + block - 1) / block, 1,
                   [&](int64_t begin, int64_t end) { body(begin * block, std::min(end * block, columns)); });
}

}  // namespace host_runtime::kernels
