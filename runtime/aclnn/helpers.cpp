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

void index_put(at::Tensor& self, const std::vector<at::Tensor>& indices, const at::Tensor& values,
               bool accumulate) {
  at::index_put_(self, optional_indices(self, indices), values, accumulate);
}

void scatter_nd_update(at::Tensor& self, const at::Tensor& indices, const at::Tensor& updates) {
  const int64_t depth = indices.size(-1);
  const at::Tensor rows = indices.reshape({-1, depth});
  c10::List<std::optional<at::Tensor>> list;
  for (int64_t i = 0; i < depth; ++i) list.push_back(rows.select(1, i).to(at::kLong));
  std::vector<int64_t> shape{rows.size(0)};
  for (int64_t i = depth; i < self.dim(); ++i) shape.push_back(self.size(i));
  at::index_put_(self, list, updates.reshape(shape));
}

void scatter(at::Tensor& self, int64_t dim, const at::Tensor& index, const at::Tensor& source,
             int64_t reduction) {
  if (reduction == 0) {
    self.scatter_(dim, index, source);
  } else {
    self.scatter_(dim, index, source, reduction == 1 ? "add" : "multiply");
  }
}

void scatter(at::Tensor& self, int64_t dim, const at::Tensor& index, const at::Scalar& value,
             int64_t reduction) {
  if (reduction == 0) {
    self.scatter_(dim, index, value);
  } else {
    self.scatter_(dim, index, value, reduction == 1 ? "add" : "multiply");
  }
}

c10::string_view scatter_reduction(int64_t code) {
  constexpr c10::string_view kNames[] = {"sum", "prod", "mean", "amax", "amin"};
  if (code < 0 || code > 4) throw std::runtime_error("argument `reduction` must be 0 to 4");
  return kNames[code];
}

at::Tensor counts(const at::Tensor& repeats) { return repeats.to(at::kLong).reshape({-1}); }

at::Tensor& after_copy(const at::Tensor& self, at::Tensor& out) {
  if (self.data_ptr() != out.data_ptr() || self.strides() != out.strides()) out.copy_(self);
  return out;
}

void copy_pair(const std::tuple<at::Tensor, at::Tensor>& results, at::Tensor& first, at::Tensor& second) {
  if (first.defined()) first.copy_(std::get<0>(results));
  if (second.defined()) second.copy_(std::get<1>(results));
}

void copy_three(const std::tuple<at::Tensor, at::Tensor, at::Tensor>& results, at::Tensor& first,
                at::Tensor& second, at::Tensor& third) {
  const auto copy = [](at::Tensor& to, const at::Tensor& from) {
    if (to.defined() && from.defined() && from.numel() == to.numel()) to.copy_(from.view(to.sizes()));
  };
  copy(first, std::get<0>(results));
  copy(second, std::get<1>(results));
  copy(third, std::get<2>(results));
}

void unique(const std::tuple<at::Tensor, at::Tensor, at::Tensor>& results, Tensor& values, Tensor& inverse,
            Tensor* counts) {
  const auto& [found, positions, occurrences] = results;
  write_dynamic(values, found);
  if (positions.numel() != 0 && inverse.numel() != 0) write_dynamic(inverse, positions);
  if (counts != nullptr && occurrences.numel() != 0 && counts->numel() != 0)
    write_dynamic(*counts, occurrences);
}

void layer_norm(const at::Tensor& input, at::IntArrayRef shape, const std::optional<at::Tensor>& weight,
                const std::optional<at::Tensor>& bias, double eps, at::Tensor& out, at::Tensor& mean,
                at::Tensor& rstd) {
  const auto same = [&](const std::optional<at::Tensor>& t) {
    return t ? std::optional<at::Tensor>(t->to(input.dtype())) : std::nullopt;
  };
  copy_three(at::native_layer_norm(input, shape, same(weight), same(bias), eps), out, mean, rstd);
}

void matmul_out(at::Tensor& out, const at::Tensor& self, const at::Tensor& other) {
  if (out.dtype() == self.dtype() && self.dtype() == other.dtype()) {
    at::matmul_out(out, self, other);
  } else {
    out.copy_(at::matmul(self.to(at::kFloat), other.to(at::kFloat)));
  }
}

void transpose_matmul_out(at::Tensor& out, const at::Tensor& x1, const at::Tensor& x2,
                          at::IntArrayRef perm_x1, at::IntArrayRef perm_x2, int64_t batch_split) {
  const at::Tensor product = at::matmul(x1.permute(perm_x1), x2.permute(perm_x2)).transpose(0, 1);
  if (batch_split == 1) {
    out.copy_(product);
  } else {
    out.copy_(product.reshape({product.size(0), batch_split, -1}).transpose(0, 1));
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
