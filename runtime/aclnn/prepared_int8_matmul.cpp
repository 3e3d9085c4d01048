#include <utility>

#include "runtime/aclnn/layout.h"
#include "runtime/aclnn/prepared_quant.h"
#include "runtime/aclnn/prepared_support.h"
#include "runtime/kernels/int8_product.h"
#include "runtime/kernels/panel_product.h"

namespace aclnn::prepared {
namespace {

using kernels::Int8Product;
using kernels::QuantParameter;
using kernels::RunMatrix;

constexpr int64_t kFractalWidth = 32;  // of int8
/// Below that many rows of x a plain weight is read where it lies, sooner than it is packed.
constexpr int64_t kPanelRows = 9;

/// False when `tensor` is none of one contiguous value or `width` of them, of floats or, where allowed,
/// int32.
bool sets(QuantParameter& parameter, const Tensor& tensor, int64_t width, bool integers) {
  if (!tensor.is_contiguous() || (tensor.numel() != 1 && tensor.numel() != width)) return false;
  parameter.data = tensor.data();
  parameter.count = tensor.numel();
  if (integers && tensor.dtype == c10::ScalarType::Int) {
    parameter.type = QuantParameter::Type::kInt32;
    return parameter.count == width;
  }
  const auto type = float_type(tensor);
  if (!type) return false;
  parameter.type = *type == kernels::Type::kHalf     ? QuantParameter::Type::kHalf
                   : *type == kernels::Type::kBFloat ? QuantParameter::Type::kBFloat
                                                     : QuantParameter::Type::kFloat;
  return true;
}

struct Product : Int8Product {
  std::optional<RunMatrix> runs;  ///< of w, for a product by panels

  Work work() const {
    if (runs)
      return [p = static_cast<const Int8Product&>(*this), w = *runs] { kernels::panel_product(p, w); };
    return bind(&kernels::int8_product, static_cast<const Int8Product&>(*this));
  }
};

/// The weight as panels read it: in FRACTAL_NZ, or plain with contiguous columns. Contiguous rows ATen packs
/// sooner.
std::optional<RunMatrix> runs_of(const Tensor& w, bool transposed) {
  if (!w.is_plain()) {
    const NzView view = nz_view(w);
    if (view.fractal_columns != kFractalWidth) return std::nullopt;
    return RunMatrix{w.storage, view.transposed != transposed, kFractalWidth,
                     view.row_blocks * kFractalRows * kFractalWidth};
  }
  const int64_t inner_axis = transposed ? 1 : 0;
  if (w.stride(inner_axis) == 1) return RunMatrix{w.data(), true, w.stride(1 - inner_axis), kFractalWidth};
  return std::nullopt;
}

/// x [.., K] times w [K, N] (transposed: [N, K]), without scales.
std::optional<Product> product_of(const Tensor& x, const Tensor& w, bool transposed, const Tensor& out) {
  const auto type = float_type(out);
  if (!type || w.dtype != c10::ScalarType::Char || w.dim() != 2) return std::nullopt;
  if (!x.is_contiguous() || !out.is_contiguous() || x.dim() < 1 || out.dim() != x.dim()) return std::nullopt;
  Product p{};
  p.type = *type;
  p.int8_x = x.dtype == c10::ScalarType::Char;
  if (!p.int8_x && x.dtype != out.dtype) return std::nullopt;
  const int64_t inner_axis = transposed ? 1 : 0;
  p.inner = w.size(inner_axis);
  p.columns = w.size(1 - inner_axis);
  if (x.numel() == 0 || p.columns == 0 || x.size(-1) != p.inner || out.size(-1) != p.columns)
    return std::nullopt;
  p.rows = x.numel() / p.inner;
  if (out.numel() != p.rows * p.columns) return std::nullopt;
  p.x = x.data();
  p.out = out.data();
  const bool columns_lie_together = w.is_plain() && (w.stride(inner_axis) == 1 || p.inner == 1);
  if (p.int8_x && kernels::has_panels() && (p.rows >= kPanelRows || !columns_lie_together)) {
    p.runs = runs_of(w, transposed);
    if (p.runs) return p;
  }
  if (!columns_lie_together || p.rows > kernels::kInt8ProductRows) return std::nullopt;
  p.w_stride = w.stride(1 - inner_axis);
  p.w = w.data<int8_t>();
  return p;
}

bool is_absent(const Tensor* tensor) { return tensor == nullptr || tensor->numel() == 0; }

}  // namespace

Work quant_matmul(const QuantProduct& a) {
  for (const Tensor* other : a.others)
    if (!is_absent(other)) return nullptr;
  if (a.transpose1 || a.x1->dtype != c10::ScalarType::Char || is_absent(a.x2_scale)) return nullptr;
  auto product = product_of(*a.x1, *a.x2, a.transpose2, *a.out);
  if (!product || !sets(product->scale, *a.x2_scale, product->columns, false)) return nullptr;
  if (!is_absent(a.x1_scale)) {
    if (a.x1_scale->dtype != c10::ScalarType::Float || !a.x1_scale->is_contiguous() ||
        a.x1_scale->numel() != product->rows)
      return nullptr;
    product->row_scale = a.x1_scale->data<float>();
  }
  if (!is_absent(a.bias) && !sets(product->bias, *a.bias, product->columns, true)) return nullptr;
  return product->work();
}

Work weight_quant_matmul(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor* offset,
                         const Tensor* bias, int64_t group, const Tensor& out) {
  if (group > 0 || !is_absent(offset) || x.dtype == c10::ScalarType::Char) return nullptr;
  auto product = product_of(x, weight, false, out);
  if (!product || !sets(product->scale, scale, product->columns, false)) return nullptr;
  if (!is_absent(bias) && !sets(product->bias, *bias, product->columns, false)) return nullptr;
  return product->work();
}

}  // namespace aclnn::prepared
