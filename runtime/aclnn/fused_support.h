// What the prepared LLM operators share: dtypes, tensors as rows, and staging of tensors whose rows are not
// contiguous.
#pragma once

#include <utility>
#include <vector>

#include "runtime/aclnn/aten.h"
#include "runtime/aclnn/operator.h"
#include "runtime/kernels/dtype.h"
#include "runtime/kernels/rows.h"

namespace aclnn::fused {

namespace kernels = host_runtime::kernels;

/// The kernels' type of a float32, float16 or bfloat16 tensor; refuses any other.
kernels::Type float_type(const Call& call, const char* name, const Tensor& tensor);

/// Refuses a tensor of another dtype than `type` says.
void require_dtype(const Call& call, const char* name, const Tensor& tensor, c10::ScalarType dtype);
void require_same_dtype(const Call& call, const char* name, const Tensor& tensor, const char* other_name,
                        const Tensor& other);
void require_shape(const Call& call, const char* name, const Tensor& tensor, c10::ArrayRef<int64_t> shape);
void require_rank(const Call& call, const char* name, const Tensor& tensor, int64_t low, int64_t high);
void require_contiguous(const Call& call, const char* name, const Tensor& tensor);

/// Elements of the last `inner` dimensions.
int64_t inner_size(const Tensor& tensor, int64_t inner);
/// The dimensions before the last `inner`, as rows.
kernels::Rows outer_rows(const Tensor& tensor, int64_t inner);
/// `tensor`'s outer rows (all but the last dimension) as seen from a tensor of shape `like`: size 1 repeats.
kernels::Rows broadcast_rows(const Tensor& tensor, const Tensor& like);
/// Whether the last `inner` dimensions lie one element behind the other.
bool has_contiguous_rows(const Tensor& tensor, int64_t inner);

/// Kernels want contiguous rows. A tensor that has none is copied before the kernel and, if written, back
/// after it.
class Staging {
 public:
  /// `tensor` itself, or a contiguous copy when its last `inner` dimensions are not contiguous.
  TensorRef in(const Tensor& tensor, int64_t inner);
  TensorRef out(const Tensor& tensor, int64_t inner);
  TensorRef in_out(const Tensor& tensor, int64_t inner);
  /// `work` with the copies around it; `work` itself when nothing was staged.
  Work around(Work work) &&;

 private:
  struct Copy {
    at::Tensor original;
    at::Tensor staged;
    bool read;
    bool write;
  };
  TensorRef stage(const Tensor& tensor, int64_t inner, bool read, bool write);
  std::vector<Copy> copies_;
};

}  // namespace aclnn::fused
