// The C functions that create and destroy aclnn handles.
#include <c10/util/complex.h>

#include <cstring>

#include "runtime/acl/task.h"
#include "runtime/aclnn/tensor.h"

namespace aclnn {
namespace {

constexpr int kNullPointer = 161001;  // ACLNN_ERR_PARAM_NULLPTR

template <typename T>
T* release(c10::intrusive_ptr<T> handle) {
  return handle.release();
}

template <typename T>
int destroy(const T* handle) {
  if (handle != nullptr) c10::intrusive_ptr<T>::reclaim(const_cast<T*>(handle));
  return 0;
}

template <typename T>
T load(const void* value) {
  T result;
  std::memcpy(&result, value, sizeof(T));
  return result;
}

c10::Scalar scalar_value(const void* value, c10::ScalarType dtype) {
  switch (dtype) {
    case c10::ScalarType::Bool:
      return c10::Scalar(load<bool>(value));
    case c10::ScalarType::ComplexFloat:
      return c10::Scalar(load<c10::complex<float>>(value));
    case c10::ScalarType::ComplexDouble:
      return c10::Scalar(load<c10::complex<double>>(value));
    case c10::ScalarType::Float:
      return c10::Scalar(load<float>(value));
    case c10::ScalarType::Double:
      return c10::Scalar(load<double>(value));
    case c10::ScalarType::Half:
      return c10::Scalar(static_cast<float>(load<c10::Half>(value)));
    case c10::ScalarType::BFloat16:
      return c10::Scalar(static_cast<float>(load<c10::BFloat16>(value)));
    case c10::ScalarType::Char:
      return c10::Scalar(static_cast<int64_t>(load<int8_t>(value)));
    case c10::ScalarType::Byte:
      return c10::Scalar(static_cast<int64_t>(load<uint8_t>(value)));
    case c10::ScalarType::Short:
      return c10::Scalar(static_cast<int64_t>(load<int16_t>(value)));
    case c10::ScalarType::UInt16:
      return c10::Scalar(static_cast<int64_t>(load<uint16_t>(value)));
    case c10::ScalarType::Int:
      return c10::Scalar(static_cast<int64_t>(load<int32_t>(value)));
    case c10::ScalarType::UInt32:
      return c10::Scalar(static_cast<int64_t>(load<uint32_t>(value)));
    case c10::ScalarType::UInt64:
      return c10::Scalar(load<uint64_t>(value));
    default:
      return c10::Scalar(load<int64_t>(value));
  }
}

}  // namespace

c10::ScalarType scalar_type(aclDataType dtype) {
  using S = c10::ScalarType;
  switch (static_cast<int>(dtype)) {
    case ACL_FLOAT:
      return S::Float;
    case ACL_FLOAT16:
      return S::Half;
    case ACL_INT8:
      return S::Char;
    case ACL_INT32:
      return S::Int;
    case ACL_UINT8:
    case ACL_INT4:
    case ACL_UINT1:
    case ACL_HIFLOAT8:
    case ACL_FLOAT4_E2M1:
    case ACL_FLOAT4_E1M2:
      return S::Byte;
    case ACL_INT16:
      return S::Short;
    case ACL_UINT16:
      return S::UInt16;
    case ACL_UINT32:
      return S::UInt32;
    case ACL_INT64:
      return S::Long;
    case ACL_UINT64:
      return S::UInt64;
    case ACL_DOUBLE:
      return S::Double;
    case ACL_BOOL:
      return S::Bool;
    case ACL_COMPLEX32:
      return S::ComplexHalf;
    case ACL_COMPLEX64:
      return S::ComplexFloat;
    case ACL_COMPLEX128:
      return S::ComplexDouble;
    case ACL_BF16:
      return S::BFloat16;
    case ACL_FLOAT8_E5M2:
      return S::Float8_e5m2;
    case ACL_FLOAT8_E4M3FN:
      return S::Float8_e4m3fn;
    case ACL_FLOAT8_E8M0:
      return S::Float8_e8m0fnu;
    default:
      return S::Undefined;
  }
}

std::string dtype_name(c10::ScalarType dtype) {
  using S = c10::ScalarType;
  switch (dtype) {
    case S::Float:
      return "float32";
    case S::Double:
      return "float64";
    case S::Half:
      return "float16";
    case S::BFloat16:
      return "bfloat16";
    case S::Char:
      return "int8";
    case S::Byte:
      return "uint8";
    case S::Short:
      return "int16";
    case S::Int:
      return "int32";
    case S::Long:
      return "int64";
    case S::Bool:
      return "bool";
    case S::ComplexFloat:
      return "complex64";
    case S::ComplexDouble:
      return "complex128";
    default:
      return c10::toString(dtype);
  }
}

}  // namespace aclnn

bool aclTensor::is_plain() const {
  switch (format) {
    case ACL_FORMAT_FRACTAL_NZ:
    case ACL_FORMAT_FRACTAL_NZ_C0_2:
    case ACL_FORMAT_FRACTAL_NZ_C0_4:
    case ACL_FORMAT_FRACTAL_NZ_C0_8:
    case ACL_FORMAT_FRACTAL_NZ_C0_16:
    case ACL_FORMAT_FRACTAL_NZ_C0_32:
    case ACL_FORMAT_NC1HWC0:
    case ACL_FORMAT_NDC1HWC0:
    case ACL_FORMAT_FRACTAL_Z:
    case ACL_FRACTAL_Z_3D:
    case ACL_FORMAT_NC1HWC0_C04:
      return false;
    default:
      return true;
  }
}

bool aclTensor::is_contiguous() const {
  if (!is_plain()) return false;
  int64_t expected = 1;
  for (int64_t i = dim() - 1; i >= 0; --i) {
    if (shape[i] == 0) return true;
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

using namespace aclnn;  // NOLINT: this file is nothing but the C interface of that namespace

extern "C" {

HOST_RUNTIME_API aclTensor* aclCreateTensor(const int64_t* view_dims, uint64_t view_dims_num,
                                            aclDataType dtype, const int64_t* stride, int64_t offset,
                                            aclFormat format, const int64_t* storage_dims,
                                            uint64_t storage_dims_num, void* data) {
  auto tensor = c10::make_intrusive<aclTensor>();
  tensor->shape.assign(view_dims, view_dims + view_dims_num);
  if (stride != nullptr) {
    tensor->strides.assign(stride, stride + view_dims_num);
  } else {
    tensor->strides.resize(view_dims_num);
    int64_t step = 1;
    for (size_t i = view_dims_num; i-- > 0; step *= view_dims[i]) tensor->strides[i] = step;
  }
  tensor->storage_shape.assign(storage_dims, storage_dims + storage_dims_num);
  tensor->offset = offset;
  tensor->acl_dtype = dtype;
  tensor->dtype = scalar_type(dtype);
  tensor->format = format;
  tensor->storage = data;
  return release(std::move(tensor));
}

HOST_RUNTIME_API aclScalar* aclCreateScalar(void* value, aclDataType dtype) {
  if (value == nullptr) return nullptr;
  auto scalar = c10::make_intrusive<aclScalar>();
  scalar->value = scalar_value(value, scalar_type(dtype));
  scalar->acl_dtype = dtype;
  return release(std::move(scalar));
}

HOST_RUNTIME_API aclIntArray* aclCreateIntArray(const int64_t* value, uint64_t size) {
  auto array = c10::make_intrusive<aclIntArray>();
  array->values.assign(value, value + size);
  return release(std::move(array));
}

HOST_RUNTIME_API aclFloatArray* aclCreateFloatArray(const float* value, uint64_t size) {
  auto array = c10::make_intrusive<aclFloatArray>();
  array->values.assign(value, value + size);
  return release(std::move(array));
}

HOST_RUNTIME_API aclBoolArray* aclCreateBoolArray(const bool* value, uint64_t size) {
  auto array = c10::make_intrusive<aclBoolArray>();
  array->values.assign(value, value + size);
  return release(std::move(array));
}

// A list takes its elements over: destroying it destroys them, as CANN documents.
HOST_RUNTIME_API aclTensorList* aclCreateTensorList(const aclTensor* const* value, uint64_t size) {
  auto list = c10::make_intrusive<aclTensorList>();
  list->tensors.reserve(size);
  for (uint64_t i = 0; i < size; ++i) {
    list->tensors.push_back(TensorRef::reclaim(const_cast<aclTensor*>(value[i])));
  }
  return release(std::move(list));
}

HOST_RUNTIME_API aclScalarList* aclCreateScalarList(const aclScalar* const* value, uint64_t size) {
  auto list = c10::make_intrusive<aclScalarList>();
  for (uint64_t i = 0; i < size; ++i) {
    list->values.push_back(value[i]->value);
    destroy(value[i]);
  }
  return release(std::move(list));
}

HOST_RUNTIME_API int aclDestroyTensor(const aclTensor* tensor) { return destroy(tensor); }
HOST_RUNTIME_API int aclDestroyScalar(const aclScalar* scalar) { return destroy(scalar); }
HOST_RUNTIME_API int aclDestroyIntArray(const aclIntArray* array) { return destroy(array); }
HOST_RUNTIME_API int aclDestroyFloatArray(const aclFloatArray* array) { return destroy(array); }
HOST_RUNTIME_API int aclDestroyBoolArray(const aclBoolArray* array) { return destroy(array); }
HOST_RUNTIME_API int aclDestroyTensorList(const aclTensorList* list) { return destroy(list); }
HOST_RUNTIME_API int aclDestroyScalarList(const aclScalarList* list) { return destroy(list); }

/// The view's shape, which operators with data-dependent results rewrite when they run. The caller releases
/// `*dims` with delete[].
HOST_RUNTIME_API int aclGetViewShape(const aclTensor* tensor, int64_t** dims, uint64_t* count) {
  if (tensor == nullptr || dims == nullptr || count == nullptr) {
    return host_runtime::fail(kNullPointer, "aclGetViewShape: tensor, dims and count must not be null");
  }
  *count = tensor->shape.size();
  *dims = new int64_t[tensor->shape.size()];
  std::copy(tensor->shape.begin(), tensor->shape.end(), *dims);
  return 0;
}

}  // extern "C"
