// aclnnLayerNorm and aclnnAddLayerNorm.
#include "runtime/aclnn/fused_support.h"
#include "runtime/aclnn/norm_operators.h"
#include "runtime/aclnn/prepared_support.h"
#include "runtime/kernels/norm.h"

namespace aclnn::fused {
namespace {

/// gamma and beta: of x's dtype, or both float32.
std::optional<kernels::Type> weight_type(const LayerNorm& a) {
  const Tensor* weight = a.gamma != nullptr ? a.gamma : a.beta;
  if (weight == nullptr) return prepared::float_type(*a.x);
  if (a.gamma != nullptr && a.beta != nullptr && a.gamma->dtype != a.beta->dtype) return std::nullopt;
  if (weight->dtype != a.x->dtype && weight->dtype != c10::ScalarType::Float) return std::nullopt;
  return prepared::float_type(*weight);
}

/// Whether operands have the sizes that x and `inner` ask for.
bool has_fitting_shapes(const LayerNorm& a) {
  const int64_t width = inner_size(*a.x, a.inner);
  for (const Tensor* tensor : {a.gamma, a.beta})
    if (tensor != nullptr && tensor->numel() != width) return false;
  for (const Tensor* tensor : {a.residual, a.y, a.sum})
    if (tensor != nullptr && tensor->shape != a.x->shape) return false;
  for (const Tensor* tensor : {a.mean, a.rstd})
    if (tensor != nullptr && width > 0 && tensor->numel() != a.x->numel() / width) return false;
  return true;
}

bool is_contiguous_float(const Tensor* tensor) {
  return tensor == nullptr || (tensor->dtype == c10::ScalarType::Float && tensor->is_contiguous());
}

}  // namespace

Work layer_norm(const LayerNorm& a) {
  const auto type = prepared::float_type(*a.x);
  const auto gamma_type = weight_type(a);
  if (a.inner < 1 || a.inner > a.x->dim() || !has_fitting_shapes(a)) return nullptr;
  if (!type || !gamma_type || !is_contiguous_float(a.mean) || !is_contiguous_float(a.rstd)) return nullptr;
  for (const Tensor* tensor : {a.residual, a.bias, a.y, a.sum})
    if (tensor != nullptr && tensor->dtype != a.x->dtype) return nullptr;
  kernels::LayerNorm norm{};
  norm.type = *type;
  norm.gamma_type = *gamma_type;
  norm.width = inner_size(*a.x, a.inner);
  norm.rows = norm.width == 0 ? 0 : a.x->numel() / norm.width;
  norm.epsilon = static_cast<float>(a.epsilon);
  Staging staging;
  const auto read = [&](const Tensor* tensor, kernels::Rows* rows) -> const void* {
    if (tensor == nullptr) return nullptr;
    const TensorRef staged = staging.in(*tensor, a.inner);
    if (rows != nullptr && tensor->dim() == a.x->dim()) *rows = outer_rows(*staged, a.inner);
    return staged->data();
  };
  const auto written = [&](const Tensor* tensor, kernels::Rows& rows) -> void* {
    if (tensor == nullptr) return nullptr;
    const TensorRef staged = staging.out(*tensor, a.inner);
    rows = outer_rows(*staged, a.inner);
    return staged->data();
  };
  norm.x = read(a.x, &norm.x_rows);
  norm.residual = read(a.residual, &norm.residual_rows);
  norm.bias = read(a.bias, &norm.bias_rows);
  norm.gamma = read(a.gamma, nullptr);
  norm.beta = read(a.beta, nullptr);
  norm.y = written(a.y, norm.y_rows);
  norm.sum = written(a.sum, norm.sum_rows);
  norm.mean = a.mean == nullptr ? nullptr : a.mean->data<float>();
  norm.rstd = a.rstd == nullptr ? nullptr : a.rstd->data<float>();
  return std::move(staging).around([norm] { kernels::layer_norm(norm); });
}

void check_add_layer_norm(const Call& call, const LayerNorm& a) {
  require_shape(call, "x2", *a.residual, a.x->shape);
  const int64_t inner = a.gamma->dim();
  if (inner < 1 || inner > a.x->dim() ||
      c10::ArrayRef<int64_t>(a.x->shape).slice(a.x->dim() - inner) != c10::ArrayRef<int64_t>(a.gamma->shape))
    call.refuse("gamma",
                "has to have the last dimensions of x1 " + describe(*a.x) + ", not " + describe(*a.gamma));
  require_shape(call, "beta", *a.beta, a.gamma->shape);
  require_same_dtype(call, "beta", *a.beta, "gamma", *a.gamma);
  if (a.bias != nullptr && a.bias->shape != a.gamma->shape && a.bias->shape != a.x->shape)
    call.refuse("biasOptional", "has to have the shape of gamma or x1, not " + describe(*a.bias));
  const bool mixed = a.x->dtype != a.residual->dtype;
  const bool float_weights = a.gamma->dtype == c10::ScalarType::Float;
  if (!float_weights && (mixed || a.gamma->dtype != a.x->dtype))
    call.refuse("gamma", "has to be float32, or have the dtype of x1 and x2 when these are alike, not " +
                             dtype_name(a.gamma->dtype));
  if (mixed && a.x->dtype != c10::ScalarType::Float && a.residual->dtype != c10::ScalarType::Float)
    call.refuse("x2", "has to have the dtype of x1 unless one of them is float32; they are " +
                          dtype_name(a.x->dtype) + " and " + dtype_name(a.residual->dtype));
  for (const auto& [name, tensor] : {std::pair{"yOut", a.y}, {"xOut", a.sum}}) {
    require_dtype(call, name, *tensor, mixed ? c10::ScalarType::Float : a.x->dtype);
    require_shape(call, name, *tensor, a.x->shape);
  }
  for (const auto& [name, tensor] : {std::pair{"meanOut", a.mean}, {"rstdOut", a.rstd}})
    require_dtype(call, name, *tensor, c10::ScalarType::Float);
}

void add_layer_norm(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& gamma,
                    const at::Tensor& beta, const std::optional<at::Tensor>& bias, double epsilon,
                    at::Tensor& y, at::Tensor& mean, at::Tensor& rstd, at::Tensor& x) {
  at::Tensor total = x1.to(at::kFloat) + x2.to(at::kFloat);
  if (bias) total = total + bias->to(at::kFloat);
  const auto [normed, means, rstds] =
      at::native_layer_norm(total, gamma.sizes(), gamma.to(at::kFloat), beta.to(at::kFloat), epsilon);
  y.copy_(normed);
  mean.copy_(means.view(mean.sizes()));
  rstd.copy_(rstds.view(rstd.sizes()));
  x.copy_(total);
}

}  // namespace aclnn::fused
