#include "runtime/aclnn/prepared_quant.h"

#include <memory>
#include <utility>
#include <vector>

#include "runtime/aclnn/fused_support.h"
#include "runtime/aclnn/prepared_support.h"
#include "runtime/kernels/quant_rows.h"

namespace aclnn::prepared {
namespace {

using kernels::QuantOutput;
using kernels::QuantParameter;
using kernels::QuantRows;

/// False when `tensor` is none of one contiguous value or `width` of them in a type that the kernel reads.
bool sets(QuantParameter& parameter, const Tensor* tensor, int64_t width) {
  if (tensor == nullptr) return true;
  if (!tensor->is_contiguous() || (tensor->numel() != 1 && tensor->numel() != width)) return false;
  switch (tensor->dtype) {
    case c10::ScalarType::Float:
      parameter.type = QuantParameter::Type::kFloat;
      break;
    case c10::ScalarType::Half:
      parameter.type = QuantParameter::Type::kHalf;
      break;
    case c10::ScalarType::BFloat16:
      parameter.type = QuantParameter::Type::kBFloat;
      break;
    case c10::ScalarType::Char:
      parameter.type = QuantParameter::Type::kInt8;
      break;
    case c10::ScalarType::Int:
      parameter.type = QuantParameter::Type::kInt32;
      break;
    default:
      return false;
  }
  parameter.data = tensor->data();
  parameter.count = tensor->numel();
  return true;
}

bool sets(QuantOutput& output, const NormQuant::Output& from, bool divide, const QuantRows& rows) {
  if (from.y == nullptr) return true;
  if (from.y->dtype != c10::ScalarType::Char || !from.y->is_contiguous() ||
      from.y->numel() != rows.rows * rows.width)
    return false;
  output.y = from.y->data<int8_t>();
  output.divide = divide;
  if (from.scale != nullptr) {
    if (from.scale->dtype != c10::ScalarType::Float || !from.scale->is_contiguous() ||
        from.scale->numel() != rows.rows)
      return false;
    output.scale = from.scale->data<float>();
  }
  return sets(output.factor, from.factor, rows.width) && sets(output.offset, from.offset, rows.width);
}

/// Rows of x's last dimension, without outputs.
std::optional<QuantRows> rows_of(const Tensor& x, kernels::RowSource source, int64_t width) {
  const auto type = float_type(x);
  if (!type || !x.is_plain() || x.dim() < 1 || x.numel() == 0 || !fused::has_contiguous_rows(x, 1))
    return std::nullopt;
  QuantRows rows{};
  rows.source = source;
  rows.type = *type;
  rows.x = x.data();
  rows.x_rows = fused::outer_rows(x, 1);
  rows.rows = x.numel() / x.size(-1);
  rows.width = width;
  return rows;
}

Work run(const QuantRows& rows) {
  auto scratch = std::make_shared<std::vector<float>>(rows.scratch());
  return [rows, scratch] { kernels::quant_rows(rows, scratch->data()); };
}

/// A tensor of x's dtype and shape with contiguous rows.
bool is_like(const Tensor& tensor, const Tensor& x) {
  return tensor.dtype == x.dtype && tensor.shape == x.shape && tensor.is_plain() &&
         fused::has_contiguous_rows(tensor, 1);
}

bool is_weight(const Tensor& tensor, const Tensor& x) {
  return tensor.dtype == x.dtype && tensor.numel() == x.size(-1) && tensor.is_contiguous();
}

}  // namespace

Work dynamic_quant(const Tensor& x, const Tensor* smooth, const Tensor* group_index, const Tensor& y,
                   const Tensor& scale, const Tensor* offset) {
  if (group_index != nullptr || (offset != nullptr && offset->numel() > 0)) return nullptr;
  auto rows = rows_of(x, kernels::RowSource::kPlain, x.dim() < 1 ? 0 : x.size(-1));
  if (!rows || !sets(rows->outputs[0], {&y, &scale, smooth, nullptr}, false, *rows)) return nullptr;
  return run(*rows);
}

Work static_quant(const Tensor& x, const Tensor& scale, const Tensor* offset, int64_t axis, bool divide,
                  const Tensor& y) {
  const bool last = axis == -1 || axis == x.dim() - 1;
  if (!last && (scale.numel() != 1 || (offset != nullptr && offset->numel() != 1))) return nullptr;
  auto rows = rows_of(x, kernels::RowSource::kPlain, x.dim() < 1 ? 0 : x.size(-1));
  if (!rows || !sets(rows->outputs[0], {&y, nullptr, &scale, offset}, divide, *rows)) return nullptr;
  return run(*rows);
}

Work swiglu_quant(const Tensor& x, const Tensor* quant_scale, const Tensor* quant_offset, bool activate_left,
                  bool dynamic, const Tensor& y, const Tensor& scale) {
  if (x.dim() < 1 || x.size(-1) % 2 != 0 || (!dynamic && quant_scale == nullptr)) return nullptr;
  const int64_t width = x.size(-1) / 2;
  auto rows = rows_of(x, kernels::RowSource::kSwiglu, width);
  if (!rows) return nullptr;
  const char* left = x.data<char>();
  const char* right = left + width * static_cast<int64_t>(x.itemsize());
  rows->x = activate_left ? left : right;
  rows->linear = activate_left ? right : left;
  const NormQuant::Output output{&y, dynamic ? &scale : nullptr, quant_scale,
                                 dynamic ? nullptr : quant_offset};
  if (!sets(rows->outputs[0], output, !dynamic, *rows)) return nullptr;
  return run(*rows);
}

Work norm_quant(const NormQuant& a) {
  auto rows = rows_of(*a.x, kernels::RowSource::kRmsNorm, a.x->dim() < 1 ? 0 : a.x->size(-1));
  if (!rows || !is_weight(*a.gamma, *a.x) || (a.beta != nullptr && !is_weight(*a.beta, *a.x))) return nullptr;
  for (const Tensor* tensor : {a.residual, a.sum})
    if (tensor != nullptr && !is_like(*tensor, *a.x)) return nullptr;
  rows->gamma = a.gamma->data();
  rows->beta = a.beta == nullptr ? nullptr : a.beta->data();
  rows->epsilon = static_cast<float>(a.epsilon);
  if (a.residual != nullptr) {
    rows->residual = a.residual->data();
    rows->residual_rows = fused::outer_rows(*a.residual, 1);
  }
  if (a.sum != nullptr) {
    rows->sum = a.sum->data();
    rows->sum_rows = fused::outer_rows(*a.sum, 1);
  }
  for (int i = 0; i < 2; ++i)
    if (!sets(rows->outputs[i], a.outputs[i], a.divide, *rows)) return nullptr;
  return run(*rows);
}

}  // namespace aclnn::prepared
