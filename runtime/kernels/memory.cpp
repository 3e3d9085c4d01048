#include "runtime/kernels/memory.h"

#include <cstring>

namespace aclnn::kernels {

Work zero(const Tensor& self) {
  if (!self.is_contiguous()) return nullptr;
  return [data = self.data(), bytes = self.nbytes()] { std::memset(data, 0, bytes); };
}

}  // namespace aclnn::kernels
