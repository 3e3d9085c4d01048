// Sharing out the columns of a product among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "runtime/acl/parts.h"

namespace host_runtime::kernels {

/// How many threads may take part in a kernel. Beside another stream of its graph it stays on its own: the
/// cores have their work.
inline int64_t kernel_threads() { return host_runtime::runs_beside_others() ? 1 : at::get_num_threads(); }

/// Weights below which sharing does not pay.
constexpr int64_t kSharedWeights = int64_t{1} << 15;
/// Weights of a part: few enough that the threads end together, enough that taking a part is not noticed.
constexpr int64_t kPartWeights = int64_t{1} << 13;

/// body(begin, end) over all columns of a matrix of `depth` rows; ranges begin at multiples of `block`.
template <typename Body>
void share_columns(int64_t depth, int64_t columns, int64_t block, const Body& body) {
  const int64_t threads = depth * columns < kSharedWeights ? 1 : kernel_threads();
  if (threads < 2) return body(0, columns);
  const int64_t width = std::max<int64_t>(1, kPartWeights / (depth * block)) * block;
  run_parts((columns + width - 1) / width, threads,
            [&](int64_t part, int64_t) { body(part * width, std::min((part + 1) * width, columns)); });
}

}  // namespace host_runtime::kernels
