// Normalisations, gated activations and rotary embeddings: phase 1 checks the arguments and prepares the
// kernel.
#pragma once

#include <string>

#include "runtime/aclnn/aten.h"
#include "runtime/aclnn/operator.h"

namespace aclnn::fused {

/// aclnnRmsNorm, aclnnGemmaRmsNorm (gamma_offset 1). x [..., gamma's shape], rstd float32 [..., 1...].
Work rms_norm(const Call& call, const Tensor& x, const Tensor& gamma, double epsilon, const Tensor& y,
              const Tensor* rstd, float gamma_offset = 0.0f);

/// aclnnAddRmsNorm and aclnnAddRmsNormCast (y_float not null): x = x1 + x2, y = norm(x) * gamma.
Work add_rms_norm(const Call& call, const Tensor& x1, const Tensor& x2, const Tensor& gamma, double epsilon,
                  const Tensor& y, const Tensor* rstd, const Tensor& x, const Tensor* y_float = nullptr);

/// aclnnSwiGlu: the halves of `x` along `dim` are a and b; out = silu(a) * b.
Work swiglu(const Call& call, const Tensor& x, int64_t dim, const Tensor& out);

/// aclnnGeGluV3: approximate 1 is the tanh form; activate_left says which half the gate is. out_gelu is the
/// gate alone.
Work geglu(const Call& call, const Tensor& x, int64_t dim, int64_t approximate, bool activate_left,
           const Tensor& out, const Tensor& out_gelu);

/// aclnnRotaryPositionEmbedding. Mode 0 half, 1 interleave.
Work rotary_position_embedding(const Call& call, const Tensor& x, const Tensor& cos, const Tensor& sin,
                               int64_t mode, const Tensor& out);

/// aclnnApplyRotaryPosEmb(V2), in place. Layout 1 BSND or BSH, 2 SBND, 3 BNSD, 4 TND; mode half, quarter or
/// interleave.
Work apply_rotary_pos_emb(const Call& call, const Tensor& query, const Tensor& key, const Tensor& cos,
                          const Tensor& sin, int64_t layout, const std::string& mode);

/// aclnnInterleaveRope: x [B, N, S, D] gathered as (even, odd) and rotated by halves.
Work interleave_rope(const Call& call, const Tensor& x, const Tensor& cos, const Tensor& sin,
                     const Tensor& out);

struct CachedRope {
  const Tensor* positions;
  const Tensor* query;
  const Tensor* key;
  const Tensor* cache;
  at::OptionalIntArrayRef sections;
  int64_t head_width;
  bool half;
  int64_t cache_mode;
  const Tensor* query_out;
  const Tensor* key_out;
};
/// aclnnRopeWithSinCosCache(V2): query and key [tokens, heads * head_width] by the cache's rows for their
/// positions.
Work rope_with_sin_cos_cache(const Call& call, const CachedRope& arguments);

}  // namespace aclnn::fused
