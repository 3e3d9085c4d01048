// Input layouts of the attention operators ("BSH", "TND", "BNSD_BSND", ...) as sizes and strides.
#pragma once

#include <string>

#include "runtime/aclnn/operator.h"
#include "runtime/kernels/attention.h"

namespace aclnn::fused {

/// A tensor of some layout as batches, tokens (S or T), heads and elements; strides in elements.
struct Axes {
  int64_t batches = 1, tokens = 1, heads = 1, width = 1;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

/// The layouts of query (and keys and values that are not paged) and of the output. Refuses unknown names.
struct InputLayout {
  std::string query;
  std::string output;
  bool packed() const { return query == "TND" || query == "NTD"; }
};
InputLayout input_layout(const Call& call, const std::string& name);

/// Refuses a tensor whose rank does not fit `layout` or whose elements of a head are not contiguous. `heads`
/// splits H.
Axes axes_of(const Call& call, const char* name, const Tensor& tensor, const std::string& layout,
             int64_t heads);

/// Rows of the kernel on a tensor that is not paged.
host_runtime::kernels::HeadRows rows_of(const Tensor& tensor, const Axes& axes);

/// A mask or bias [.., Sq, Sk] of two to four dimensions as strides; size 1 repeats. `rows_are_batches`: with
/// a single query token two and three dimensions are [B, Sk] and [B, 1, Sk]. Refuses what does not cover
/// batches, heads, tokens and keys.
struct ScoreAxes {
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};
struct ScoreShape {
  int64_t batches, heads, tokens, keys;
};
ScoreAxes score_axes(const Call& call, const char* name, const Tensor& tensor, const ScoreShape& shape,
                     bool rows_are_batches);

/// Which keys a row sees, from sparse_mode, pre_tokens and next_tokens; with_mask says whether a mask was
/// passed.
host_runtime::kernels::Band band_of(const Call& call, int64_t sparse_mode, int64_t pre_tokens,
                                    int64_t next_tokens, bool with_mask);

/// Whether the mode takes the compressed 2048 x 2048 mask.
inline bool compressed_mask(int64_t sparse_mode) { return sparse_mode >= 2 && sparse_mode <= 4; }
/// Refuses a compressed mask of another shape, and returns its memory.
const uint8_t* compressed_mask_memory(const Call& call, const Tensor* mask, int64_t sparse_mode);
void require_mask_dtype(const Call& call, const Tensor& mask, bool allow_int8);

}  // namespace aclnn::fused
