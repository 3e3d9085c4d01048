// Attention and the writes to its caches: phase 1 checks the arguments and prepares the kernel.
#pragma once

#include <string>

#include "runtime/aclnn/aten.h"
#include "runtime/aclnn/operator.h"
#include "runtime/kernels/kv_cache.h"

namespace aclnn::fused {

/// The arguments of aclnnFusedInferAttentionScore V1 to V5 that this runtime computes with, under the names
/// of the documents. `unsupported` holds those that have to be absent.
struct FusedInferAttention {
  struct Absent {
    const char* name;
    const void* value;
  };
  const Tensor* query = nullptr;
  const TensorList* key = nullptr;
  const TensorList* value = nullptr;
  const Tensor* pse_shift = nullptr;
  const Tensor* atten_mask = nullptr;
  at::OptionalIntArrayRef actual_seq_lengths;
  at::OptionalIntArrayRef actual_seq_lengths_kv;
  const Tensor* block_table = nullptr;
  const Tensor* query_rope = nullptr;
  const Tensor* key_rope = nullptr;
  const Tensor* learnable_sink = nullptr;
  int64_t num_heads = 1;
  double scale = 1.0;
  int64_t pre_tokens = 0;
  int64_t next_tokens = 0;
  std::string input_layout;
  int64_t num_key_value_heads = 0;
  int64_t sparse_mode = 0;
  int64_t inner_precise = 0;
  int64_t block_size = 0;
  bool softmax_lse_flag = false;
  const Tensor* attention_out = nullptr;
  const Tensor* softmax_lse = nullptr;
  std::vector<Absent> unsupported;
};

/// Checks the documented constraints and prepares the kernel; asks for its scratch as workspace.
Work fused_infer_attention(Call& call, const FusedInferAttention& arguments);

/// aclnnFlashAttentionScore(V2) and aclnnFlashAttentionVarLenScore(V2), forward only.
struct FlashAttention {
  const Tensor* query = nullptr;
  const Tensor* key = nullptr;
  const Tensor* value = nullptr;
  const Tensor* real_shift = nullptr;
  const Tensor* drop_mask = nullptr;
  const Tensor* padding_mask = nullptr;
  const Tensor* atten_mask = nullptr;
  at::OptionalIntArrayRef prefix;
  at::OptionalIntArrayRef actual_seq_qlen;
  at::OptionalIntArrayRef actual_seq_kvlen;
  double scale = 1.0;
  double keep_prob = 1.0;
  int64_t pre_tokens = 0;
  int64_t next_tokens = 0;
  int64_t head_num = 1;
  std::string input_layout;
  int64_t inner_precise = 0;
  int64_t sparse_mode = 0;
  const Tensor* softmax_max = nullptr;
  const Tensor* softmax_sum = nullptr;
  const Tensor* attention_out = nullptr;
  int64_t pse_type = 1;  ///< 0: realShift is added to the scaled scores; 1: scores are scaled with it
};
Work flash_attention(Call& call, const FlashAttention& arguments);

/// aclnnScatterPaKvCache: row t of key and value goes to slot_mapping[t] of the caches; negative slots are
/// skipped. Mode "Norm" (or none): caches [blocks, block size, heads, head size]; "PA_NZ": [blocks, heads *
/// head size / c, block size, c].
struct ScatterPaKvCache {
  const Tensor* key = nullptr;
  const Tensor* key_cache = nullptr;
  const Tensor* slot_mapping = nullptr;
  const Tensor* value = nullptr;
  const Tensor* value_cache = nullptr;
  const Tensor* compress_lens = nullptr;
  const Tensor* compress_seq_offsets = nullptr;
  const Tensor* seq_lens = nullptr;
  std::string cache_mode;
};
Work scatter_pa_kv_cache(const Call& call, const ScatterPaKvCache& arguments);

/// aclnnGatherPaKvCache: the reverse, for the first tokens of every request.
struct GatherPaKvCache {
  const Tensor* key_cache = nullptr;
  const Tensor* value_cache = nullptr;
  const Tensor* block_tables = nullptr;
  const Tensor* seq_lens = nullptr;
  const Tensor* key = nullptr;
  const Tensor* value = nullptr;
  const Tensor* seq_offset = nullptr;
  std::string cache_mode;
  bool is_seq_lens_cumsum = false;
};
Work gather_pa_kv_cache(const Call& call, const GatherPaKvCache& arguments);

/// A cache as cacheMode names it: plain [blocks, block size, heads, head size], or NZ [blocks, row size / c,
/// block size, c] with c elements of 32 bytes, whether the tensor says ND (it was made with that shape) or
/// FRACTAL_NZ.
host_runtime::kernels::PagedCache paged_cache(const Call& call, const char* name, const Tensor& cache,
                                              bool nz);

/// aclnnQkvRmsNormRopeCache: qkv [tokens, (Nq + Nk + Nv) * D] split, queries and keys normalised and rotated
/// by halves, keys and values (quantised where scales are given) written to PA_NZ caches.
struct QkvRmsNormRopeCache {
  const Tensor* qkv = nullptr;
  const Tensor* query_gamma = nullptr;
  const Tensor* key_gamma = nullptr;
  const Tensor* cos = nullptr;
  const Tensor* sin = nullptr;
  const Tensor* index = nullptr;
  const Tensor* query_out = nullptr;
  const Tensor* key_cache = nullptr;
  const Tensor* value_cache = nullptr;
  const Tensor* key_scale = nullptr;
  const Tensor* value_scale = nullptr;
  const Tensor* key_offset = nullptr;
  const Tensor* value_offset = nullptr;
  at::IntArrayRef qkv_size;
  at::IntArrayRef head_nums;
  double epsilon = 0.0;
  std::string cache_mode;
  const Tensor* query_rows = nullptr;
  const Tensor* key_rows = nullptr;
  const Tensor* value_rows = nullptr;
};
Work qkv_rms_norm_rope_cache(const Call& call, const QkvRmsNormRopeCache& arguments);

}  // namespace aclnn::fused
