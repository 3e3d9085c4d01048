// Bounds of single tensors, for builds under the address sanitizer (`make test-sanitize`).
//
// The sanitizer knows where an allocation ends. torch_npu's cache puts many tensors into one, so that a
// kernel that reads or writes past the end of its tensor meets a neighbour. In such builds therefore only the
// bytes that an operator says it touches are addressable while it runs; the rest of the allocations that they
// lie in is not. In others this costs nothing.
#pragma once

#include <mutex>
#include <shared_mutex>
#include <vector>

#include "runtime/acl/task.h"

namespace host_runtime::bounds {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kKept = true;
#else
constexpr bool kKept = false;
#endif

/// As long as it lives, of the device memory around `touched` nothing but `touched` is addressable. One at a
/// time: what is addressable is so for every thread.
class HOST_RUNTIME_API OnlyThese {
 public:
  explicit OnlyThese(const std::vector<MemoryAccess>& touched);
  ~OnlyThese();
  OnlyThese(const OnlyThese&) = delete;
  OnlyThese& operator=(const OnlyThese&) = delete;

 private:
  std::unique_lock<std::shared_mutex> alone_;
  std::vector<MemoryAccess> around_;
};

/// Copies and fills take it: meanwhile nothing is kept from them. Empty where bounds are not kept.
std::shared_lock<std::shared_mutex> lifted();

}  // namespace host_runtime::bounds
