#include "runtime/aclnn/helpers.h"

#include "runtime/aclnn/aten.h"

namespace aclnn {
namespace {

c10::List<std::optional<at::Tensor>> optional_indices(const at::Tensor& self,
                                                      const std::vector<at::Tensor>& indices) {
  c10::List<std::optional<at::Tensor>> list;
  list.reserve(indices.size());
  for (const at::Tensor& index : indices) {
    const bool absent = !index.defined() || (index.numel() == 0 && self.numel() != 0 && index.dim() == 1);
    list.push_back(absent ? std::nullopt : std::optional<at::Tensor>(index));
  }
  return list;
}

}  // namespace

at::Tensor wrapped(const at::Scalar& value) {
  at::Tensor tensor = at::scalar_tensor(value, at::dtype(value.type()));
  tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  return tensor;
}

std::optional<c10::string_view> rounding(int32_t mode) {
  if (mode == 1) return "trunc";
  if (mode == 2) return "floor";
  return std::nullopt;
}

void write_dynamic(Tensor& out, const at::Tensor& result) {
  if (result.numel() > out.numel()) {
    throw std::runtime_error("result `out` has room for " + std::to_string(out.numel()) + " elements, and " +
                             std::to_string(result.numel()) + " are needed");
  }
  out.shape.assign(result.sizes().begin(), result.sizes().end());
  out.strides.resize(result.dim());
  int64_t step = 1;
  for (int64_t i = result.dim() - 1; i >= 0; step *= out.shape[i--]) out.strides[i] = step;
  view(out).copy_(result);
}

namespace helper {

void one_hot(const at::Tensor& self, int64_t classes, const at::Tensor& on, const at::Tensor& off,
             int64_t axis, at::Tensor& out) {
  const at::Tensor hit = self.unsqueeze(-1).eq(at::arange(classes, self.options()));
  const at::Tensor placed = axis == -1 ? hit : hit.movedim(-1, axis);
  out.copy_(at::where(placed, on.to(out.dtype()), off.to(out.dtype())));
}

void index_out(at::Tensor& out, const at::Tensor& self, const std::vector<at::Tensor>& indices) {
  out.copy_(at::index(self, optional_indices(self, indices)));
}

void embedding_out(at::Tensor& out, const at::Tensor& weight, const at::Tensor& indices) {
  at::Tensor flat = out.view({-1, weight.size(1)});
  at::index_select_out(flat, weight, 0, indices.reshape({-1}));
}

void max_dim(const at::Tensor& self, int64_t dim, bool keepdim, at::Tensor& out, at::Tensor& indices) {
  auto [values, positions] = at::max(self, dim, keepdim);
  out.copy_(values);
  indices.copy_(positions);
}

void min_dim(const at::Tensor& self, int64_t dim, bool keepdim, at::Tensor& out, at::Tensor& indices) {
  auto [values, positions] = at::min(self, dim, keepdim);
  out.copy_(values);
  indices.copy_(positions);
}

void matmul_out(at::Tensor& out, const at::Tensor& self, const at::Tensor& other) {
  if (out.dtype() == self.dtype() && self.dtype() == other.dtype()) {
    at::matmul_out(out, self, other);
  } else {
    out.copy_(at::matmul(self.to(at::kFloat), other.to(at::kFloat)));
  }
}

void addmm_out(at::Tensor& out, const at::Tensor& self, const at::Tensor& mat1, const at::Tensor& mat2,
               const at::Scalar& beta, const at::Scalar& alpha) {
  if (out.dtype() == mat1.dtype() && self.dtype() == mat1.dtype() && mat1.dtype() == mat2.dtype()) {
    at::addmm_out(out, self, mat1, mat2, beta, alpha);
  } else {
    out.copy_(at::addmm(self.to(at::kFloat), mat1.to(at::kFloat), mat2.to(at::kFloat), beta, alpha));
  }
}

}  // namespace helper

}  // namespace aclnn
