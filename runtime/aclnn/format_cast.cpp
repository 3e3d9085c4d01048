// aclnnNpuFormatCastCalculateSizeAndFormat: what storage a tensor needs in another format.
#include <algorithm>

#include "runtime/aclnn/layout.h"
#include "runtime/aclnn/operator.h"

namespace aclnn {
namespace {

constexpr const char* kName = "aclnnNpuFormatCastCalculateSizeAndFormat";

/// Columns of a fractal for the dtype that the matrix product will read the weight as; 0 when there is none.
int64_t columns_for(int additional_dtype) {
  switch (additional_dtype) {
    case ACL_INT8:
    case ACL_UINT8:
      return 32;
    case ACL_FLOAT16:
    case ACL_BF16:
      return 16;
    case ACL_FLOAT:
    case ACL_INT32:
      return 8;
    default:
      return 0;
  }
}

Dims storage_of(const Tensor& source, int format, int additional_dtype) {
  if (format == ACL_FORMAT_ND) return source.shape;
  const int64_t columns = columns_for(additional_dtype);
  if (format != ACL_FORMAT_FRACTAL_NZ || columns == 0 || source.dim() < 2 || source.dim() > 6) {
    throw ArgumentError(
        kParamInvalid, std::string(kName) + ": format " + std::to_string(format) + " of " + describe(source) +
                           " for dtype " + std::to_string(additional_dtype) +
                           " is not one it makes; it makes ND (2) and, of tensors with 2 to 6 "
                           "dimensions, FRACTAL_NZ (29)");
  }
  return nz_storage_shape(source.shape, columns);
}

}  // namespace
}  // namespace aclnn

/// `shape` is allocated with new[] and belongs to the caller.
extern "C" HOST_RUNTIME_API int aclnnNpuFormatCastCalculateSizeAndFormat(const aclTensor* source, int format,
                                                                         int additional_dtype,
                                                                         int64_t** shape, uint64_t* rank,
                                                                         int* actual_format) {
  if (source == nullptr || shape == nullptr || rank == nullptr || actual_format == nullptr) {
    return host_runtime::fail(aclnn::kParamNullptr, std::string(aclnn::kName) + ": no argument may be null");
  }
  try {
    const aclnn::Dims storage = aclnn::storage_of(*source, format, additional_dtype);
    *shape = new int64_t[storage.size()];
    std::copy(storage.begin(), storage.end(), *shape);
    *rank = storage.size();
    *actual_format = format;
    return 0;
  } catch (...) {
    return aclnn::refused(aclnn::kName);
  }
}
