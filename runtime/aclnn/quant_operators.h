// Quantisation and int8 matmuls with ATen, for what prepared_quant.h declines. Values are rounded to nearest
// even and saturated.
#pragma once

#include <utility>

#include "runtime/aclnn/aten.h"

namespace aclnn::fused {

using OptionalTensor = std::optional<at::Tensor>;

/// round(values) saturated to int8.
at::Tensor quantized(const at::Tensor& values);
/// Rows as int8 and their scales: max(|row|) / 127 each; a row of zeros has scale 0.
std::pair<at::Tensor, at::Tensor> dynamically_quantized(const at::Tensor& values);
/// The exact product of int8 matrices, as int32.
at::Tensor int8_product(const at::Tensor& a, const at::Tensor& b);
/// Scales as float: floating point, or the 64-bit form that TransQuantParam packs.
at::Tensor channel_scale(const at::Tensor& scale);

/// aclnnDynamicQuant(V2): per token, with smooth scales [H] or, with group_index (ends of groups), [groups,
/// H]. With an offset it is asymmetric.
void dynamic_quant(const at::Tensor& x, const OptionalTensor& smooth, const OptionalTensor& group_index,
                   at::Tensor& y, at::Tensor& scale, at::Tensor& offset);
/// aclnnAscendQuant(V3): y = round(x * scale + offset) along `axis`.
void ascend_quant(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset, bool sqrt_mode,
                  const std::string& round_mode, int64_t axis, at::Tensor& y);
/// aclnnQuantize: out = round(x / scales + zero_points) along `axis`, saturated to out's dtype.
void quantize(const at::Tensor& x, const at::Tensor& scales, const OptionalTensor& zero_points, int64_t axis,
              at::Tensor& out);
/// aclnnTransQuantParamV2: the scale's bits without the low 13, a 9-bit offset at bit 37, bit 46 set.
void trans_quant_param(const at::Tensor& scale, const OptionalTensor& offset, at::Tensor& out);

/// aclnnRmsNormQuant: round((norm(x) * gamma + beta) / scale + offset), one scale; NaN gives 0.
void rms_norm_quant(const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta,
                    const at::Tensor& scale, const at::Tensor& offset, double epsilon, at::Tensor& y);

struct AddRmsNormQuant {
  OptionalTensor scales1, scales2, zero_points1, zero_points2, beta;
  double epsilon;
  bool div_mode;
};
/// aclnnAddRmsNormQuant(V2): x = x1 + x2, y_i = round(norm(x) / scales_i + zero_points_i), or * without
/// div_mode.
void add_rms_norm_quant(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& gamma,
                        const AddRmsNormQuant& options, at::Tensor& y1, at::Tensor& y2, at::Tensor& x,
                        at::Tensor& normed);
/// aclnnAddRmsNormDynamicQuant(V2).
void add_rms_norm_dynamic_quant(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& gamma,
                                const OptionalTensor& smooth1, const OptionalTensor& smooth2,
                                const OptionalTensor& beta, double epsilon, at::Tensor& y1, at::Tensor& y2,
                                at::Tensor& x, at::Tensor& scale1, at::Tensor& scale2);

struct QuantMatmul {
  OptionalTensor x1_scale, x2_scale, x2_offset, bias;
  bool transpose1, transpose2;
};
/// aclnnQuantMatmulV5 and WeightNz: int8 x1 [.., M, K] and x2 [.., K, N].
void quant_matmul(const at::Tensor& x1, const at::Tensor& x2, const QuantMatmul& options, at::Tensor& out);

/// aclnnWeightQuantBatchMatmulV2/V3: x [M, K] times (weight + offset) * scale, weight int8 [K, N]; scale [N],
/// or [K / group, N].
void weight_quant_matmul(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                         const OptionalTensor& offset, const OptionalTensor& bias, int64_t group,
                         at::Tensor& out);

struct DequantSwigluQuant {
  OptionalTensor weight_scale, activation_scale, bias, quant_scale, quant_offset, group_index;
  bool activate_left;
  std::string quant_mode;
};
/// aclnnDequantSwigluQuant: int32 sums (or floats) back to floats, SwiGLU over halves, int8 again.
void dequant_swiglu_quant(const at::Tensor& x, const DequantSwigluQuant& options, at::Tensor& y,
                          at::Tensor& scale);

struct SwigluQuant {
  OptionalTensor smooth, offsets;  ///< [groups, H] or [groups]; [H], [1, H] or [1] without groups
  OptionalTensor group_index;      ///< ends of the groups of rows, or their sizes
  bool activate_left, dynamic, counts;
};
/// aclnnSwiGluQuantV2. Dynamic: rows times their smooth scales, then times scale = 127 / max(|row|), which is
/// what `scale` returns (the inverse of aclnnDynamicQuant's). Rows behind the last group are not smoothed.
void swiglu_quant(const at::Tensor& x, const SwigluQuant& options, at::Tensor& y, at::Tensor& scale);

}  // namespace aclnn::fused
