#include <ATen/core/ATen_fwd.h>

#include <memory>
#include <utility>
#include <vector>

#include "runtime/aclnn/layout.h"
#include "runtime/aclnn/prepared.h"
#include "runtime/aclnn/prepared_support.h"
#include "runtime/kernels/fractal_product.h"
#include "runtime/kernels/panel_product.h"
#include "runtime/kernels/row_product.h"
#include "runtime/kernels/row_tiles.h"

namespace aclnn::prepared {
namespace {

// As small as a call of ATen's blocked products.
constexpr int64_t kSmallProduct = 32 * 1024;

/// The batch dimensions of an operand as one: how far its matrices lie apart.
struct Batch {
  int64_t count = 1;
  int64_t stride = 0;
};
std::optional<Batch> batch_of(const Tensor& tensor) {
  Batch batch;
  for (int64_t i = tensor.dim() - 3; i >= 0; --i) {
    if (tensor.shape[i] == 1) continue;
    if (batch.count == 1) {
      batch.stride = tensor.strides[i];
    } else if (tensor.strides[i] != batch.count * batch.stride) {
      return std::nullopt;
    }
    batch.count *= tensor.shape[i];
  }
  return batch;
}

/// Sizes and strides of self [.., M, K] @ mat2 [.., K, N] -> out [.., M, N].
struct Product {
  kernels::Gemv gemv{};
  kernels::Type type{};
  bool transposed = false;
};

bool is_row_contiguous(const Tensor& tensor) { return tensor.stride(-1) == 1 || tensor.size(-1) == 1; }

bool sets_weight(Product& product, const Tensor& mat2) {
  kernels::Gemv& g = product.gemv;
  if (mat2.stride(-2) == 1 || g.inner == 1) {
    product.transposed = true;
    g.w_stride = mat2.stride(-1);
    // One row only, or one column: both ways are contiguous, and whole rows are the quicker.
    if (mat2.stride(-1) == 1 && g.columns > 1) product.transposed = false, g.w_stride = mat2.stride(-2);
    return true;
  }
  g.w_stride = mat2.stride(-2);
  return mat2.stride(-1) == 1 || g.columns == 1;
}

bool sets_batches(kernels::Gemv& g, const Tensor& self, const Tensor& mat2, const Tensor& out) {
  const auto x = batch_of(self), w = batch_of(mat2), y = batch_of(out);
  if (!x || !w || !y || x->count != y->count || (w->count != 1 && w->count != y->count)) return false;
  g.batches = y->count;
  g.x_batch = x->stride;
  g.w_batch = w->count == 1 ? 0 : w->stride;
  g.out_batch = y->stride;
  // One matrix for all batches: more rows instead, so that it is read once.
  const bool mergeable = g.rows == 1 || (g.x_batch == g.rows * g.x_row && g.out_batch == g.rows * g.out_row);
  if (g.w_batch == 0 && g.batches > 1 && mergeable) {
    if (g.rows == 1) g.x_row = g.x_batch, g.out_row = g.out_batch;
    g.rows *= std::exchange(g.batches, 1);
  }
  return true;
}

/// Whether AMX multiplies panels of the weight, before ATen. Where rows lie together, ATen packs them sooner.
bool takes_panels(const Product& product) {
  constexpr int64_t kWorth = 32;  // of each size: with less, tiles are mostly padding
  const kernels::Gemv& g = product.gemv;
  return product.type == kernels::Type::kBFloat && product.transposed && g.batches == 1 &&
         kernels::has_panels() && g.rows > kernels::gemv_rows(product.type, product.transposed) &&
         g.inner >= kWorth && g.columns >= kWorth;
}

std::optional<Product> product_of(const Tensor& self, const Tensor& mat2, const Tensor& out) {
  if (!self.is_plain() || !out.is_plain()) return std::nullopt;
  const auto type = float_type(self);
  if (!type || mat2.dtype != self.dtype || out.dtype != self.dtype) return std::nullopt;
  if (self.dim() < 2 || mat2.dim() < 2 || out.dim() != self.dim()) return std::nullopt;
  Product product;
  product.type = *type;
  kernels::Gemv& g = product.gemv;
  g.rows = self.size(-2);
  g.inner = self.size(-1);
  g.columns = mat2.size(-1);
  if (mat2.size(-2) != g.inner || out.size(-2) != g.rows || out.size(-1) != g.columns) return std::nullopt;
  if (g.rows == 0 || g.inner == 0 || g.columns == 0) return std::nullopt;
  if (!is_row_contiguous(self) || !is_row_contiguous(out) || !sets_weight(product, mat2)) return std::nullopt;
  g.x = self.data();
  g.w = mat2.data();
  g.out = out.data();
  g.x_row = self.stride(-2);
  g.out_row = out.stride(-2);
  if (!sets_batches(g, self, mat2, out) || g.batches == 0) return std::nullopt;
  const bool tiles = kernels::takes_row_tiles(g, product.type, product.transposed);
  const bool few = g.rows <= kernels::gemv_rows(product.type, product.transposed);
  if (!few && !tiles && !takes_panels(product) && g.rows * g.inner * g.columns > kSmallProduct)
    return std::nullopt;
  g.alpha = 1.0f;
  g.beta = 1.0f;
  return product;
}

Work run(const Product& product) {
  if (kernels::takes_row_tiles(product.gemv, product.type, product.transposed)) {
    auto scratch = std::make_shared<std::vector<char>>(kernels::row_tiles_scratch(product.gemv));
    return [gemv = product.gemv, scratch] { kernels::row_tiles(gemv, scratch->data()); };
  }
  if (takes_panels(product)) {
    const kernels::RunMatrix w{product.gemv.w, true, product.gemv.w_stride, kernels::kFractalWidth};
    return [gemv = product.gemv, w] { kernels::panel_product(gemv, w); };
  }
  return bind(kernels::gemv_kernel(product.type, product.transposed), product.gemv);
}

/// x [.., K] times a packed matrix [K, N].
Work packed_product(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& out) {
  const auto type = float_type(x);
  if (!type || *type == kernels::Type::kFloat || weight.dtype != x.dtype || out.dtype != x.dtype)
    return nullptr;
  if (weight.dim() != 2 || x.dim() < 1 || out.dim() != x.dim() || !x.is_contiguous() || !out.is_contiguous())
    return nullptr;
  const int64_t inner = weight.size(0), columns = weight.size(1);
  if (inner == 0 || columns == 0 || x.numel() == 0 || x.size(-1) != inner) return nullptr;
  if (out.numel() != x.numel() / inner * columns || out.size(-1) != columns) return nullptr;
  if (bias != nullptr &&
      (bias->dtype != x.dtype || bias->dim() != 1 || bias->numel() != columns || !bias->is_contiguous()))
    return nullptr;
  const NzView view = nz_view(weight);
  if (view.fractal_columns != kernels::kFractalWidth) return nullptr;
  kernels::FractalProduct product{};
  product.type = *type;
  product.x = x.data();
  product.w = weight.storage;
  product.bias = bias == nullptr ? nullptr : bias->data();
  product.out = out.data();
  product.by_rows = view.transposed;
  product.rows = x.numel() / inner;
  product.inner = inner;
  product.columns = columns;
  product.block = view.row_blocks * kFractalRows * view.fractal_columns;
  auto scratch = std::make_shared<std::vector<float>>(product.scratch());
  return [product, scratch] { kernels::fractal_product(product, scratch->data()); };
}

bool is_one(const at::Scalar& number) { return !number.isComplex() && number.toDouble() == 1; }

}  // namespace

Work matmul(const Tensor& self, const Tensor& mat2, const Tensor& out) {
  if (!mat2.is_plain()) return packed_product(self, mat2, nullptr, out);
  const auto product = product_of(self, mat2, out);
  return product ? run(*product) : nullptr;
}

Work addmm(const Tensor& self, const Tensor& mat1, const Tensor& mat2, const at::Scalar& beta,
           const at::Scalar& alpha, const Tensor& out) {
  if (!mat2.is_plain())
    return is_one(beta) && is_one(alpha) ? packed_product(mat1, mat2, &self, out) : nullptr;
  if (!self.is_plain() || beta.isComplex() || alpha.isComplex() || self.dtype != out.dtype || out.dim() != 2)
    return nullptr;
  auto product = product_of(mat1, mat2, out);
  const auto strides = broadcast_strides(self, out.shape);
  if (!product || !strides || ((*strides)[1] != 1 && out.shape[1] != 1)) return nullptr;
  // Without beta the bias is not even read: it may hold NaN.
  product->gemv.beta = beta.to<float>();
  product->gemv.bias = product->gemv.beta == 0.0f ? nullptr : self.data();
  product->gemv.bias_row = (*strides)[0];
  product->gemv.alpha = alpha.to<float>();
  return run(*product);
}

}  // namespace aclnn::prepared
