// The bridge to ATen for `=` definitions: device tensors as CPU tensors over the same memory.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "runtime/aclnn/operator.h"

namespace aclnn {

/// A tensor on the memory of `tensor`. Plain formats only.
at::Tensor view(const Tensor& tensor);

/// A tensor argument of a body that calls ATen. A plain operand is a view made once; one in a private format
/// is unpacked by open() at each run (its bytes may have changed since) and, if written, packed again by
/// close().
class AtenOperand {
 public:
  AtenOperand() = default;
  explicit AtenOperand(const Tensor* tensor);

  at::Tensor& open();
  /// For results: refuses a body that computed another shape than the argument's, which ATen would resize
  /// silently.
  void close(const char* name);

 private:
  TensorRef handle_;
  at::Tensor tensor_;
  bool plain_ = true;
};

/// The same for lists; open() gives tensors in the list's order.
class AtenOperands {
 public:
  explicit AtenOperands(const TensorList* list);
  std::vector<at::Tensor>& open();
  void close(const char* name);

 private:
  std::vector<AtenOperand> operands_;
  std::vector<at::Tensor> tensors_;
};

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace aclnn
