// What the aclnn handles hold. torch_npu treats them as opaque, so the layout is ours; they are
// reference-counted, because torch_npu destroys its handles right after an operator's second phase while a
// captured graph may run the operator much later.
#pragma once

#include <c10/core/Scalar.h>
#include <c10/core/ScalarType.h>
#include <c10/util/SmallVector.h>
#include <c10/util/intrusive_ptr.h>

#include <functional>
#include <string>
#include <vector>

#include "acl/acl.h"

namespace aclnn {
using Dims = c10::SmallVector<int64_t, 6>;
}

/// A view on device memory. `strides` and `offset` count elements of the tensor's ND layout; when `format` is
/// FRACTAL_NZ the bytes lie in the order of `storage_shape` instead, and only layout.h reads them.
struct aclTensor final : c10::intrusive_ptr_target {
  aclnn::Dims shape;
  aclnn::Dims strides;
  aclnn::Dims storage_shape;
  int64_t offset = 0;
  aclDataType acl_dtype = ACL_DT_UNDEFINED;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  aclFormat format = ACL_FORMAT_ND;
  void* storage = nullptr;

  int64_t dim() const { return static_cast<int64_t>(shape.size()); }
  /// Size of dimension `i`; negative counts from the end. The caller knows that the dimension exists.
  int64_t size(int64_t i) const { return shape[i < 0 ? i + dim() : i]; }
  int64_t stride(int64_t i) const { return strides[i < 0 ? i + dim() : i]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : shape) n *= s;
    return n;
  }
  size_t itemsize() const { return c10::elementSize(dtype); }
  size_t nbytes() const { return static_cast<size_t>(numel()) * itemsize(); }

  /// Whether the bytes lie as shape, strides and offset say (not in a private format such as FRACTAL_NZ).
  bool is_plain() const;
  /// Plain, and elements lie one after another in row-major order.
  bool is_contiguous() const;
  /// First element of a plain tensor.
  template <typename T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(storage) + offset * static_cast<int64_t>(itemsize()));
  }
};

struct aclScalar final : c10::intrusive_ptr_target {
  c10::Scalar value;
  aclDataType acl_dtype = ACL_DT_UNDEFINED;
};

namespace aclnn {

using Tensor = ::aclTensor;
using TensorRef = c10::intrusive_ptr<aclTensor>;

/// A counted reference to a live handle (the caller keeps its own).
template <typename T>
c10::intrusive_ptr<T> share(const T* handle) {
  return c10::intrusive_ptr<T>::reclaim_copy(const_cast<T*>(handle));
}

/// torch's dtype of a CANN dtype, Undefined when torch has none (4-bit types are packed bytes: Byte).
c10::ScalarType scalar_type(aclDataType dtype);
/// The name users write: "float16", "bfloat16", "int64".
std::string dtype_name(c10::ScalarType dtype);

/// A prepared operator body: everything resolved, ready to run any number of times. An empty one means that
/// the fast path declines these arguments.
using Work = std::function<void()>;

}  // namespace aclnn

struct aclIntArray final : c10::intrusive_ptr_target {
  std::vector<int64_t> values;
};
struct aclFloatArray final : c10::intrusive_ptr_target {
  std::vector<float> values;
};
struct aclBoolArray final : c10::intrusive_ptr_target {
  std::vector<uint8_t> values;
};
struct aclTensorList final : c10::intrusive_ptr_target {
  std::vector<aclnn::TensorRef> tensors;
  size_t size() const { return tensors.size(); }
  const aclTensor& operator[](size_t i) const { return *tensors[i]; }
};
struct aclScalarList final : c10::intrusive_ptr_target {
  std::vector<c10::Scalar> values;
};

namespace aclnn {
using TensorList = ::aclTensorList;
}
