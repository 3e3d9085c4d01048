#include "runtime/aclnn/norm_operators.h"

#include <algorithm>

#include "runtime/aclnn/fused_support.h"
#include "runtime/kernels/activation.h"
#include "runtime/kernels/norm.h"

namespace aclnn::fused {
namespace {

/// Checks what all RMSNorms share and fills in x, gamma, y, rstd and the sizes.
kernels::RmsNorm norm_of(const Call& call, const char* name, const Tensor& x, const Tensor& gamma,
                         double epsilon, const Tensor& y, const Tensor* rstd) {
  const int64_t inner = gamma.dim();
  if (inner < 1 || inner > x.dim() ||
      c10::ArrayRef<int64_t>(x.shape).slice(x.dim() - inner) != c10::ArrayRef<int64_t>(gamma.shape))
    call.refuse("gamma", "has to have the last dimensions of " + std::string(name) + " " + describe(x) +
                             ", not " + describe(gamma));
  require_same_dtype(call, "y", y, name, x);
  require_shape(call, "y", y, x.shape);
  if (gamma.dtype != x.dtype && gamma.dtype != c10::ScalarType::Float)
    call.refuse("gamma", "has to have the dtype of " + std::string(name) + " or float32, not " +
                             dtype_name(gamma.dtype));
  kernels::RmsNorm norm{};
  norm.type = float_type(call, name, x);
  norm.gamma_type = gamma.dtype == x.dtype ? norm.type : kernels::Type::kFloat;
  norm.width = inner_size(x, inner);
  norm.rows = norm.width == 0 ? 0 : x.numel() / norm.width;
  norm.epsilon = static_cast<float>(epsilon);
  if (rstd != nullptr) {
    require_dtype(call, "rstd", *rstd, c10::ScalarType::Float);
    if (rstd->numel() != norm.rows)
      call.refuse("rstd", "has to have one element a row (" + std::to_string(norm.rows) + "), not " +
                              describe(*rstd));
    require_contiguous(call, "rstd", *rstd);
    norm.rstd = rstd->data<float>();
  }
  return norm;
}

/// The two halves of `x` along `dim`, as rows of the dimensions from `dim` on.
kernels::GatedActivation halves_of(const Call& call, const Tensor& x, int64_t dim, bool activate_left,
                                   const Tensor& out) {
  if (x.dim() == 0 || dim < -x.dim() || dim >= x.dim())
    call.refuse("dim", "has to lie in [" + std::to_string(-x.dim()) + ", " + std::to_string(x.dim() - 1) +
                           "], not " + std::to_string(dim));
  const int64_t axis = dim < 0 ? dim + x.dim() : dim;
  if (x.shape[axis] % 2 != 0)
    call.refuse("x", "has to have an even size along dim " + std::to_string(axis) + ", not " + describe(x));
  require_same_dtype(call, "out", out, "x", x);
  Dims half = x.shape;
  half[axis] /= 2;
  require_shape(call, "out", out, half);
  kernels::GatedActivation gated{};
  gated.type = float_type(call, "x", x);
  gated.width = inner_size(out, x.dim() - axis);
  gated.rows = gated.width == 0 ? 0 : out.numel() / gated.width;
  gated.input_row_stride = 2 * gated.width;
  gated.output_row_stride = gated.width;
  const char* base = x.data<char>();
  const char* second = base + gated.width * static_cast<int64_t>(x.itemsize());
  gated.activated = activate_left ? base : second;
  gated.linear = activate_left ? second : base;
  gated.y = out.data();
  return gated;
}

}  // namespace

Work rms_norm(const Call& call, const Tensor& x, const Tensor& gamma, double epsilon, const Tensor& y,
              const Tensor* rstd, float gamma_offset) {
  kernels::RmsNorm norm = norm_of(call, "x", x, gamma, epsilon, y, rstd);
  norm.gamma_offset = gamma_offset;
  const int64_t inner = gamma.dim();
  Staging staging;
  const TensorRef in = staging.in(x, inner);
  const TensorRef weight = staging.in(gamma, inner);
  const TensorRef out = staging.out(y, inner);
  norm.x = in->data();
  norm.x_rows = outer_rows(*in, inner);
  norm.gamma = weight->data();
  norm.y = out->data();
  norm.y_rows = outer_rows(*out, inner);
  return std::move(staging).around([norm] { kernels::rms_norm(norm); });
}

Work add_rms_norm(const Call& call, const Tensor& x1, const Tensor& x2, const Tensor& gamma, double epsilon,
                  const Tensor& y, const Tensor* rstd, const Tensor& x, const Tensor* y_float) {
  kernels::RmsNorm norm = norm_of(call, "x1", x1, gamma, epsilon, y, rstd);
  require_same_dtype(call, "x2", x2, "x1", x1);
  require_shape(call, "x2", x2, x1.shape);
  require_same_dtype(call, "x", x, "x1", x1);
  require_shape(call, "x", x, x1.shape);
  norm.round_before_gamma = true;
  if (y_float != nullptr) {
    require_dtype(call, "y1", *y_float, c10::ScalarType::Float);
    require_shape(call, "y1", *y_float, x1.shape);
    require_contiguous(call, "y1", *y_float);
    norm.y_float = y_float->data<float>();
  }
  const int64_t inner = gamma.dim();
  Staging staging;
  const TensorRef in = staging.in(x1, inner);
  const TensorRef residual = staging.in(x2, inner);
  const TensorRef weight = staging.in(gamma, inner);
  const TensorRef out = staging.out(y, inner);
  const TensorRef total = staging.out(x, inner);
  norm.x = in->data();
  norm.x_rows = outer_rows(*in, inner);
  norm.residual = residual->data();
  norm.residual_rows = outer_rows(*residual, inner);
  norm.gamma = weight->data();
  norm.y = out->data();
  norm.y_rows = outer_rows(*out, inner);
  norm.sum = total->data();
  norm.sum_rows = outer_rows(*total, inner);
  return std::move(staging).around([norm] { kernels::rms_norm(norm); });
}

Work swiglu(const Call& call, const Tensor& x, int64_t dim, const Tensor& out) {
  Staging staging;
  const TensorRef in = staging.in(x, x.dim());
  const TensorRef result = staging.out(out, out.dim());
  kernels::GatedActivation gated = halves_of(call, *in, dim, true, *result);
  gated.gate = kernels::Gate::kSilu;
  return std::move(staging).around([gated] { kernels::gated_activation(gated); });
}

Work geglu(const Call& call, const Tensor& x, int64_t dim, int64_t approximate, bool activate_left,
           const Tensor& out, const Tensor& out_gelu) {
  if (approximate != 0 && approximate != 1)
    call.refuse("approximate", "has to be 0 (erf) or 1 (tanh), not " + std::to_string(approximate));
  Staging staging;
  const TensorRef in = staging.in(x, x.dim());
  const TensorRef result = staging.out(out, out.dim());
  const TensorRef gate = staging.out(out_gelu, out_gelu.dim());
  kernels::GatedActivation gated = halves_of(call, *in, dim, activate_left, *result);
  require_same_dtype(call, "outGelu", *gate, "x", *in);
  require_shape(call, "outGelu", *gate, result->shape);
  gated.gate = approximate == 1 ? kernels::Gate::kGeluTanh : kernels::Gate::kGeluErf;
  gated.gated = gate->data();
  return std::move(staging).around([gated] { kernels::gated_activation(gated); });
}

Work gelu_mul(const Call& call, const Tensor& input, const std::string& approximate, const Tensor& out) {
  if (!approximate.empty() && approximate != "none" && approximate != "tanh")
    call.refuse("approximate", "has to be none or tanh, not " + approximate);
  require_rank(call, "input", input, 2, 8);
  constexpr int64_t kWidest = 1024, kMostRows = 200000;
  if (input.size(-1) > kWidest || (input.size(-1) > 0 && input.numel() / input.size(-1) > kMostRows))
    call.refuse("input", "has to have a last dimension of at most 1024 and at most 200000 rows, not " +
                             describe(input) + "; npu_geglu takes wider ones");
  Staging staging;
  const TensorRef in = staging.in(input, input.dim());
  const TensorRef result = staging.out(out, out.dim());
  kernels::GatedActivation gated = halves_of(call, *in, -1, true, *result);
  gated.gate = approximate == "tanh" ? kernels::Gate::kGeluTanh : kernels::Gate::kGeluErf;
  return std::move(staging).around([gated] { kernels::gated_activation(gated); });
}

}  // namespace aclnn::fused
