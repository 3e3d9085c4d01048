#include "runtime/kernels/memory.h"

#include "runtime/acl/task.h"

namespace aclnn::kernels {

Work zero(const Tensor& self) {
  if (!self.is_contiguous()) return nullptr;
  return [data = self.data(), bytes = self.nbytes()] { host_runtime::zero_fill(data, bytes); };
}

}  // namespace aclnn::kernels
