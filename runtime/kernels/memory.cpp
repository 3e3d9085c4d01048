#include "runtime/kernels/memory.h"

#include <cstring>

#include "runtime/acl/task.h"

namespace aclnn::kernels {
namespace {

constexpr size_t kManyBytes = size_t{1} << 20;  // from here on, untouched pages are worth keeping untouched

}  // namespace

Work zero(const Tensor& self) {
  if (!self.is_contiguous()) return nullptr;
  const size_t bytes = self.nbytes();
  if (bytes >= kManyBytes) return [data = self.data(), bytes] { host_runtime::zero_fill(data, bytes); };
  return [data = self.data(), bytes] { std::memset(data, 0, bytes); };
}

}  // namespace aclnn::kernels
