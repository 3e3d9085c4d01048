#include "runtime/aclnn/quant_operators.h"

#include <cstring>

namespace aclnn::fused {
namespace {

constexpr double kInt8Max = 127.0;

at::Tensor normed_float(const at::Tensor& x, const at::Tensor& gamma, const OptionalTensor& beta,
                        double epsilon) {
  const at::Tensor floats = x.to(at::kFloat);
  at::Tensor result = floats * at::rsqrt(floats.pow(2).mean(-1, true) + epsilon) * gamma.to(at::kFloat);
  return beta ? result + beta->to(at::kFloat) : result;
}

at::Tensor scaled(const at::Tensor& normed, const OptionalTensor& scales, const OptionalTensor& zero_points,
                  bool div) {
  const at::Tensor factor = scales->to(at::kFloat);
  at::Tensor result = div ? normed / factor : normed * factor;
  return zero_points ? result + zero_points->to(at::kFloat) : result;
}

/// Rows times the smooth scales of their group; groups are given by their ends.
at::Tensor smoothed(const at::Tensor& rows, const OptionalTensor& smooth, const OptionalTensor& group_index) {
  if (!smooth) return rows;
  if (!group_index) return rows * smooth->to(at::kFloat);
  const at::Tensor ends = group_index->to(at::kLong);
  const at::Tensor group = at::searchsorted(ends, at::arange(rows.size(0), at::kLong), false, /*right=*/true)
                               .clamp_max(ends.size(0) - 1);
  return rows * smooth->to(at::kFloat).index_select(0, group);
}

/// One element, or one for each of x along `axis`, as floats that broadcast with x.
at::Tensor along(const at::Tensor& t, const at::Tensor& x, int64_t axis) {
  at::Tensor floats = t.to(at::kFloat);
  if (floats.dim() == 1 && floats.numel() > 1)
    for (int64_t i = (axis < 0 ? axis + x.dim() : axis) + 1; i < x.dim(); ++i) floats = floats.unsqueeze(-1);
  return floats;
}

}  // namespace

at::Tensor quantized(const at::Tensor& values) { return values.round().clamp(-128, 127).to(at::kChar); }

std::pair<at::Tensor, at::Tensor> dynamically_quantized(const at::Tensor& values) {
  const at::Tensor scale = values.abs().amax(-1, true) * static_cast<float>(1.0 / kInt8Max);
  return {quantized((values / scale).nan_to_num(0.0)), scale.squeeze(-1)};
}

at::Tensor int8_product(const at::Tensor& a, const at::Tensor& b) {
  if (a.dim() == 2 && b.dim() == 2) return at::_int_mm(a.contiguous(), b.contiguous());
  // float64 holds every sum of fewer than 2^38 products exactly.
  return at::matmul(a.to(at::kDouble), b.to(at::kDouble)).to(at::kInt);
}

at::Tensor channel_scale(const at::Tensor& scale) {
  if (scale.is_floating_point()) return scale.to(at::kFloat);
  const at::Tensor packed = scale.contiguous();
  at::Tensor result = at::empty(scale.sizes(), at::kFloat);
  const auto* from = static_cast<const uint64_t*>(packed.const_data_ptr());
  for (int64_t i = 0; i < packed.numel(); ++i) {
    const auto bits = static_cast<uint32_t>(from[i]);
    std::memcpy(result.mutable_data_ptr<float>() + i, &bits, sizeof(bits));
  }
  return result;
}

void dynamic_quant(const at::Tensor& x, const OptionalTensor& smooth, const OptionalTensor& group_index,
                   at::Tensor& y, at::Tensor& scale, at::Tensor& offset) {
  TORCH_CHECK(y.scalar_type() == at::kChar, "y has to be int8 on the host runtime, not ", y.scalar_type());
  const at::Tensor rows = smoothed(x.to(at::kFloat).reshape({-1, x.size(-1)}), smooth, group_index);
  if (!offset.defined() || offset.numel() == 0) {
    const auto [values, scales] = dynamically_quantized(rows);
    y.copy_(values.view(y.sizes()));
    scale.copy_(scales.view(scale.sizes()));
    return;
  }
  const at::Tensor most = rows.amax(-1, true);
  const at::Tensor scales = (most - rows.amin(-1, true)) * static_cast<float>(1.0 / 255.0);
  const at::Tensor offsets = kInt8Max - most / scales;
  y.copy_(quantized((rows / scales + offsets).nan_to_num(0.0)).view(y.sizes()));
  scale.copy_(scales.view(scale.sizes()));
  offset.copy_(offsets.view(offset.sizes()));
}

void ascend_quant(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset, bool sqrt_mode,
                  const std::string& round_mode, int64_t axis, at::Tensor& y) {
  TORCH_CHECK(y.scalar_type() == at::kChar, "y has to be int8 on the host runtime, not ", y.scalar_type());
  const at::Tensor factor = along(scale, x, axis);
  at::Tensor values = x.to(at::kFloat) * (sqrt_mode ? factor * factor : factor);
  if (offset) values = values + along(*offset, x, axis);
  if (round_mode == "floor") values = values.floor();
  if (round_mode == "ceil") values = values.ceil();
  if (round_mode == "trunc") values = values.trunc();
  y.copy_(quantized(values));
}

void quantize(const at::Tensor& x, const at::Tensor& scales, const OptionalTensor& zero_points, int64_t axis,
              at::Tensor& out) {
  at::Tensor values = x.to(at::kFloat) / along(scales, x, axis);
  if (zero_points) values = values + along(*zero_points, x, axis);
  if (out.scalar_type() == at::kInt) {
    out.copy_(values.to(at::kDouble).round().clamp(INT32_MIN, INT32_MAX));
  } else if (out.scalar_type() == at::kByte) {
    out.copy_(values.round().clamp(0, 255));
  } else {
    out.copy_(quantized(values));
  }
}

void trans_quant_param(const at::Tensor& scale, const OptionalTensor& offset, at::Tensor& out) {
  const at::Tensor scales = scale.to(at::kFloat).contiguous();
  const at::Tensor offsets = offset ? offset->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor result = at::empty({std::max(scales.numel(), offset ? offsets.numel() : int64_t{0})}, at::kLong);
  for (int64_t i = 0; i < result.numel(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, scales.const_data_ptr<float>() + (scales.numel() == 1 ? 0 : i), sizeof(bits));
    uint64_t packed = (bits & 0xFFFFE000u) | (uint64_t{1} << 46);
    if (offset) {
      const float value = offsets.const_data_ptr<float>()[offsets.numel() == 1 ? 0 : i];
      const auto whole = static_cast<int64_t>(std::nearbyint(std::min(255.0f, std::max(-256.0f, value))));
      packed |= (static_cast<uint64_t>(whole) & 0x1FF) << 37;
    }
    std::memcpy(result.mutable_data_ptr<int64_t>() + i, &packed, sizeof(packed));
  }
  std::memcpy(out.mutable_data_ptr(), result.const_data_ptr(), static_cast<size_t>(result.nbytes()));
}

void rms_norm_quant(const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& beta,
                    const at::Tensor& scale, const at::Tensor& offset, double epsilon, at::Tensor& y) {
  const at::Tensor normed = normed_float(x, gamma.reshape({-1}), beta.reshape({-1}), epsilon);
  y.copy_(quantized((normed / scale.to(at::kFloat) + offset.to(at::kFloat)).nan_to_num(0.0)));
}

void add_rms_norm_quant(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& gamma,
                        const AddRmsNormQuant& o, at::Tensor& y1, at::Tensor& y2, at::Tensor& x,
                        at::Tensor& normed) {
  const at::Tensor total = x1 + x2;
  const at::Tensor result = normed_float(total, gamma, o.beta, o.epsilon);
  y1.copy_(quantized(scaled(result, o.scales1, o.zero_points1, o.div_mode)));
  if (o.scales2 && y2.defined()) y2.copy_(quantized(scaled(result, o.scales2, o.zero_points2, o.div_mode)));
  x.copy_(total);
  if (normed.defined() && normed.numel() > 0) normed.copy_(result);
}

void add_rms_norm_dynamic_quant(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& gamma,
                                const OptionalTensor& smooth1, const OptionalTensor& smooth2,
                                const OptionalTensor& beta, double epsilon, at::Tensor& y1, at::Tensor& y2,
                                at::Tensor& x, at::Tensor& scale1, at::Tensor& scale2) {
  const at::Tensor total = x1 + x2;
  const at::Tensor result = normed_float(total, gamma, beta, epsilon);
  const auto write = [&](const OptionalTensor& smooth, at::Tensor& y, at::Tensor& scale) {
    const auto [values, scales] = dynamically_quantized(smooth ? result * smooth->to(at::kFloat) : result);
    y.copy_(values);
    scale.copy_(scales.view(scale.sizes()));
  };
  write(smooth1, y1, scale1);
  if (smooth2 && y2.defined() && y2.numel() == total.numel()) write(smooth2, y2, scale2);
  x.copy_(total);
}

void quant_matmul(const at::Tensor& x1, const at::Tensor& x2, const QuantMatmul& o, at::Tensor& out) {
  TORCH_CHECK(x1.scalar_type() == at::kChar && x2.scalar_type() == at::kChar,
              "x1 and x2 have to be int8 on the host runtime, not ", x1.scalar_type(), " and ",
              x2.scalar_type());
  at::Tensor product =
      int8_product(o.transpose1 ? x1.transpose(-1, -2) : x1, o.transpose2 ? x2.transpose(-1, -2) : x2);
  if (o.bias && o.bias->scalar_type() == at::kInt) product = product + *o.bias;
  if (out.scalar_type() == at::kInt) {
    out.copy_(product);
    return;
  }
  at::Tensor result = product.to(at::kFloat) * channel_scale(*o.x2_scale);
  if (o.x1_scale) result = result * o.x1_scale->to(at::kFloat).reshape({-1, 1});
  if (o.bias && o.bias->scalar_type() != at::kInt) result = result + o.bias->to(at::kFloat);
  if (out.scalar_type() == at::kChar) {
    if (o.x2_offset) result = result + o.x2_offset->to(at::kFloat);
    out.copy_(quantized(result));
  } else {
    out.copy_(result);
  }
}

void weight_quant_matmul(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                         const OptionalTensor& offset, const OptionalTensor& bias, int64_t group,
                         at::Tensor& out) {
  TORCH_CHECK(weight.scalar_type() == at::kChar, "weight has to be int8 on the host runtime, not ",
              weight.scalar_type());
  const auto spread = [&](const at::Tensor& t) {
    const at::Tensor floats = t.to(at::kFloat);
    return group > 0 ? floats.repeat_interleave(group, 0).narrow(0, 0, weight.size(0)) : floats;
  };
  at::Tensor values = weight.to(at::kFloat);
  if (offset) values = values + spread(*offset);
  at::Tensor result = at::matmul(x.to(at::kFloat), values * spread(scale));
  out.copy_(bias ? result + bias->to(at::kFloat) : result);
}

void dequant_swiglu_quant(const at::Tensor& x, const DequantSwigluQuant& o, at::Tensor& y,
                          at::Tensor& scale) {
  at::Tensor values = x.to(at::kFloat);
  if (o.bias && o.bias->scalar_type() == at::kInt) values = (x + *o.bias).to(at::kFloat);
  if (o.weight_scale) values = values * o.weight_scale->to(at::kFloat);
  if (o.activation_scale) values = values * o.activation_scale->to(at::kFloat).reshape({-1, 1});
  if (o.bias && o.bias->scalar_type() != at::kInt) values = values + o.bias->to(at::kFloat);
  const auto halves = values.chunk(2, -1);
  const at::Tensor gated = at::silu(halves[o.activate_left ? 0 : 1]) * halves[o.activate_left ? 1 : 0];
  if (o.quant_mode == "static") {
    at::Tensor result = gated / o.quant_scale->to(at::kFloat);
    if (o.quant_offset) result = result + o.quant_offset->to(at::kFloat);
    y.copy_(quantized(result));
    return;
  }
  const auto [rows, scales] =
      dynamically_quantized(o.quant_scale ? gated * o.quant_scale->to(at::kFloat) : gated);
  y.copy_(rows);
  scale.copy_(scales.view(scale.sizes()));
}

void swiglu_quant(const at::Tensor& x, const SwigluQuant& o, at::Tensor& y, at::Tensor& scale) {
  const int64_t width = x.size(-1) / 2;
  const auto halves = x.to(at::kFloat).reshape({-1, 2 * width}).chunk(2, -1);
  at::Tensor rows = at::silu(halves[o.activate_left ? 0 : 1]) * halves[o.activate_left ? 1 : 0];
  const int64_t count = rows.size(0);
  at::Tensor group = at::zeros({count}, at::kLong);
  int64_t grouped = count;
  if (o.group_index) {
    const at::Tensor listed = o.group_index->to(at::kLong);
    const at::Tensor ends = o.counts ? listed.cumsum(0) : listed;
    group = at::searchsorted(ends, at::arange(count, at::kLong), false, /*right=*/true);
    grouped = std::min(count, ends[-1].item<int64_t>());
    group.clamp_max_(ends.size(0) - 1);
  }
  /// Rows of [groups, H] or [groups], one a row of x.
  const auto spread = [&](const at::Tensor& t) {
    const bool per_channel = t.dim() == 2 || (!o.group_index && t.numel() == width);
    return t.reshape({-1, per_channel ? width : 1}).index_select(0, group.narrow(0, 0, grouped));
  };
  at::Tensor smoothed = rows.narrow(0, 0, grouped);
  if (o.smooth) smoothed.mul_(spread(*o.smooth));
  if (!o.dynamic) {
    smoothed.add_(spread(*o.offsets));
    y.copy_(quantized(rows).view(y.sizes()));
    return;
  }
  const at::Tensor factors = kInt8Max / rows.abs().amax(-1, true);
  y.copy_(quantized((rows * factors).nan_to_num(0.0)).view(y.sizes()));
  scale.copy_(factors.view(scale.sizes()));
}

}  // namespace aclnn::fused
