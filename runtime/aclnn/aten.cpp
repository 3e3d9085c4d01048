#include "runtime/aclnn/aten.h"

#include <c10/core/InferenceMode.h>

#include "runtime/aclnn/layout.h"

namespace aclnn {

at::Tensor view(const Tensor& tensor) {
  // A caller in inference mode must not turn these into inference tensors, which other threads could not
  // write.
  c10::InferenceMode guard(false);
  return at::for_blob(tensor.data(), tensor.shape)
      .strides(tensor.strides)
      .options(at::TensorOptions().dtype(tensor.dtype).device(at::kCPU))
      .target_device(at::kCPU)
      .make_tensor();
}

AtenOperand::AtenOperand(const Tensor* tensor) {
  if (tensor == nullptr) return;
  handle_ = share(tensor);
  plain_ = tensor->is_plain();
  if (plain_) tensor_ = view(*tensor);
}

at::Tensor& AtenOperand::open() {
  if (!plain_) tensor_ = unpack(*handle_);
  return tensor_;
}

void AtenOperand::close(const char* name) {
  if (!handle_) return;
  if (tensor_.sizes() != at::IntArrayRef(handle_->shape)) {
    throw std::runtime_error(std::string("result `") + name + "` has shape " + describe(handle_->shape) +
                             " but the operator computes " + describe(tensor_.sizes()));
  }
  if (!plain_) {
    pack(tensor_, *handle_);
    tensor_.reset();
  }
}

AtenOperands::AtenOperands(const TensorList* list) {
  if (list == nullptr) return;
  operands_.reserve(list->size());
  for (const TensorRef& tensor : list->tensors) operands_.emplace_back(tensor.get());
  tensors_.resize(list->size());
}

std::vector<at::Tensor>& AtenOperands::open() {
  for (size_t i = 0; i < operands_.size(); ++i) tensors_[i] = operands_[i].open();
  return tensors_;
}

void AtenOperands::close(const char* name) {
  for (AtenOperand& operand : operands_) operand.close(name);
}

}  // namespace aclnn
