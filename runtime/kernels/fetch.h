// Fetching memory before it is read.
#pragma once

#include <cstdint>

#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {

constexpr int64_t kLineBytes = 64;

/// What a kernel fetches of the weights that it comes to.
enum class Fetch {
  kNothing,
  kFromMemory,  ///< by fetch_line
  kFromCache,   ///< of weights that lie in a cache already: into the first level, which costs least there
};

/// Fetches a line into the second level, and the one 1 KiB behind it. So who walks from line to line asks for
/// each of them twice, without which Intel's processors soon stop fetching ahead by themselves.
KERNEL_INLINE void fetch_line(const void* at) {
  constexpr int64_t kBehind = 1024;
  __builtin_prefetch(at, 0, 2);
  __builtin_prefetch(static_cast<const char*>(at) + kBehind, 0, 2);
}

}  // namespace host_runtime::kernels
