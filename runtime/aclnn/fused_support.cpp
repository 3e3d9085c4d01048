#include "runtime/aclnn/fused_support.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include "runtime/aclnn/prepared_support.h"

namespace aclnn::fused {

kernels::Type float_type(const Call& call, const char* name, const Tensor& tensor) {
  if (const auto type = prepared::float_type(tensor)) return *type;
  call.refuse(name, "has to be float32, float16 or bfloat16, not " + dtype_name(tensor.dtype));
}

void require_dtype(const Call& call, const char* name, const Tensor& tensor, c10::ScalarType dtype) {
  if (tensor.dtype != dtype)
    call.refuse(name, "has to be " + dtype_name(dtype) + ", not " + dtype_name(tensor.dtype));
}

void require_same_dtype(const Call& call, const char* name, const Tensor& tensor, const char* other_name,
                        const Tensor& other) {
  if (tensor.dtype != other.dtype)
    call.refuse(name, "has to have the dtype of " + std::string(other_name) + ", " + dtype_name(other.dtype) +
                          ", not " + dtype_name(tensor.dtype));
}

void require_shape(const Call& call, const char* name, const Tensor& tensor, c10::ArrayRef<int64_t> shape) {
  if (c10::ArrayRef<int64_t>(tensor.shape) != shape)
    call.refuse(name, "has to have shape " + describe(shape) + ", not " +
                          describe(c10::ArrayRef<int64_t>(tensor.shape)));
}

void require_rank(const Call& call, const char* name, const Tensor& tensor, int64_t low, int64_t high) {
  if (tensor.dim() < low || tensor.dim() > high)
    call.refuse(
        name, "has to have " +
                  (low == high ? std::to_string(low) : std::to_string(low) + " to " + std::to_string(high)) +
                  " dimensions, not " + describe(tensor));
}

void require_contiguous(const Call& call, const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous())
    call.refuse(
        name,
        "has to be contiguous, as the operator reads it where it lies (call .contiguous() first); it is " +
            describe(tensor) + " with strides " + describe(c10::ArrayRef<int64_t>(tensor.strides)));
}

int64_t inner_size(const Tensor& tensor, int64_t inner) {
  int64_t size = 1;
  for (int64_t i = tensor.dim() - inner; i < tensor.dim(); ++i) size *= tensor.shape[i];
  return size;
}

kernels::Rows outer_rows(const Tensor& tensor, int64_t inner) {
  kernels::Rows rows;
  for (int64_t i = 0; i + inner < tensor.dim(); ++i) rows.add(tensor.shape[i], tensor.strides[i]);
  return rows;
}

kernels::Rows broadcast_rows(const Tensor& tensor, const Tensor& like) {
  kernels::Rows rows;
  const int64_t missing = like.dim() - tensor.dim();
  for (int64_t i = 0; i + 1 < like.dim(); ++i) {
    const bool repeats = i < missing || tensor.shape[i - missing] == 1;
    rows.add(like.shape[i], repeats ? 0 : tensor.strides[i - missing]);
  }
  return rows;
}

bool has_contiguous_rows(const Tensor& tensor, int64_t inner) {
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; i >= tensor.dim() - inner; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

TensorRef Staging::in(const Tensor& tensor, int64_t inner) { return stage(tensor, inner, true, false); }
TensorRef Staging::out(const Tensor& tensor, int64_t inner) { return stage(tensor, inner, false, true); }
TensorRef Staging::in_out(const Tensor& tensor, int64_t inner) { return stage(tensor, inner, true, true); }

TensorRef Staging::stage(const Tensor& tensor, int64_t inner, bool read, bool write) {
  if (has_contiguous_rows(tensor, inner)) return share(&tensor);
  auto staged = c10::make_intrusive<aclTensor>();
  at::Tensor memory = at::empty(tensor.shape, at::TensorOptions(tensor.dtype));
  staged->shape = tensor.shape;
  staged->strides.assign(memory.strides().begin(), memory.strides().end());
  staged->storage_shape = tensor.shape;
  staged->acl_dtype = tensor.acl_dtype;
  staged->dtype = tensor.dtype;
  staged->storage = memory.data_ptr();
  copies_.push_back({view(tensor), std::move(memory), read, write});
  return staged;
}

Work Staging::around(Work work) && {
  if (copies_.empty()) return work;
  return [copies = std::move(copies_), work = std::move(work)] {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (const Copy& copy : copies)
      if (copy.read) copy.staged.copy_(copy.original);
    work();
    for (const Copy& copy : copies)
      if (copy.write) copy.original.copy_(copy.staged);
  };
}

}  // namespace aclnn::fused
