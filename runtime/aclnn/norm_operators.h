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

/// aclnnLayerNorm and aclnnAddLayerNorm: normalises x (+ residual + bias, bias of gamma's or x's shape) over
/// gamma's dimensions. Declines operands of mixed dtypes.
struct LayerNorm {
  const Tensor* x = nullptr;
  const Tensor* residual = nullptr;
  const Tensor* bias = nullptr;
  const Tensor* gamma = nullptr;
  const Tensor* beta = nullptr;
  int64_t inner = 1;  ///< dimensions that are normalised
  double epsilon = 0.0;
  const Tensor* y = nullptr;
  const Tensor* mean = nullptr;
  const Tensor* rstd = nullptr;
  const Tensor* sum = nullptr;
};
Work layer_norm(const LayerNorm& arguments);
/// Refuses what the document of aclnnAddLayerNorm forbids.
void check_add_layer_norm(const Call& call, const LayerNorm& arguments);
/// The same in ATen, for mixed dtypes.
void add_layer_norm(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& gamma,
                    const at::Tensor& beta, const std::optional<at::Tensor>& bias, double epsilon,
                    at::Tensor& y, at::Tensor& mean, at::Tensor& rstd, at::Tensor& x);

/// aclnnGeluMul: gelu of the first half of the last dimension, times the second.
Work gelu_mul(const Call& call, const Tensor& input, const std::string& approximate, const Tensor& out);

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
