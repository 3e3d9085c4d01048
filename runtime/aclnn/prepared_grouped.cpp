#include <c10/util/Exception.h>

#include <memory>
#include <vector>

#include "runtime/aclnn/layout.h"
#include "runtime/aclnn/prepared.h"
#include "runtime/aclnn/prepared_support.h"
#include "runtime/kernels/fractal_product.h"

namespace aclnn::prepared {
namespace {

/// Refuses packed matrices that the operator does not take: both sizes have to fill fractals of 16 x 16, of
/// int8 16 x 32 as they are packed.
void require_full_fractals(const Call& call, const TensorList& weights) {
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    if (weight.is_plain()) continue;
    const NzView view = nz_view(weight);
    if (view.rows % kFractalRows != 0 || view.columns % view.fractal_columns != 0)
      call.refuse("weight", "in FRACTAL_NZ has to have matrices of whole fractals, " +
                                std::to_string(kFractalRows) + " x " + std::to_string(view.fractal_columns) +
                                "; they are " + describe(weight));
  }
}

/// Groups of rows of x [rows, inner], each times its own packed matrix.
struct Groups {
  kernels::FractalProduct product;  ///< of the first group; x, w and out move on
  int64_t count, all_rows, matrix;
  bool ends;  ///< the list says where groups end, not how many rows they have
  const void* list;
  c10::ScalarType list_type;

  int64_t entry(int64_t group) const {
    return list_type == c10::ScalarType::Long ? static_cast<const int64_t*>(list)[group]
                                              : static_cast<const int32_t*>(list)[group];
  }

  void run(float* scratch) const {
    int64_t start = 0;
    for (int64_t group = 0; group < count; ++group) {
      const int64_t end = ends ? entry(group) : start + entry(group);
      TORCH_CHECK(end >= start && end <= all_rows, "group_list gives rows ", start, " to ", end, " of group ",
                  group, ", but x has ", all_rows);
      if (end > start) multiply(group, start, end, scratch);
      start = end;
    }
  }

  const std::byte* matrix_of(int64_t group) const {
    return static_cast<const std::byte*>(product.w) + group * matrix * 2;
  }
  static void* at_row(const void* base, int64_t row, int64_t elements) {
    return const_cast<std::byte*>(static_cast<const std::byte*>(base)) + row * elements * 2;
  }

  void multiply(int64_t group, int64_t start, int64_t end, float* scratch) const {
    kernels::FractalProduct part = product;
    part.x = at_row(product.x, start, product.inner);
    part.out = at_row(product.out, start, product.columns);
    part.w = matrix_of(group);
    part.rows = end - start;
    kernels::fractal_product(part, scratch);
  }
};

bool is_absent(const TensorList* list) {
  return list == nullptr || list->size() == 0 || (*list)[0].numel() == 0;
}

}  // namespace

Work grouped_matmul_nz(const Call& call, const PackedGroups& a) {
  require_full_fractals(call, a.weight);
  if (a.x.size() != 1 || a.weight.size() != 1 || a.out.size() != 1 || a.list == nullptr ||
      a.group_type != 0 || a.act_type != 0 || (a.list_type != 0 && a.list_type != 1))
    return nullptr;
  for (const TensorList* other : a.others) {
    if (!is_absent(other)) return nullptr;
  }
  const Tensor &x = a.x[0], &weight = a.weight[0], &out = a.out[0];
  const auto type = float_type(x);
  if (!type || *type == kernels::Type::kFloat || weight.dtype != x.dtype || out.dtype != x.dtype)
    return nullptr;
  if (weight.is_plain() || weight.dim() != 3 || x.dim() != 2 || out.dim() != 2) return nullptr;
  if (!x.is_contiguous() || !out.is_contiguous() || !a.list->is_contiguous()) return nullptr;
  if (a.list->dtype != c10::ScalarType::Long && a.list->dtype != c10::ScalarType::Int) return nullptr;
  const NzView view = nz_view(weight);
  if (view.fractal_columns != kernels::kFractalWidth || a.list->numel() != weight.size(0) ||
      x.size(1) != weight.size(1) || out.size(0) != x.size(0) || out.size(1) != weight.size(2))
    return nullptr;
  Groups groups{};
  groups.product.type = *type;
  groups.product.x = x.data();
  groups.product.w = weight.storage;
  groups.product.out = out.data();
  groups.product.by_rows = view.transposed;
  groups.product.rows = x.size(0);  // for the scratch
  groups.product.inner = x.size(1);
  groups.product.columns = out.size(1);
  groups.product.block = view.row_blocks * kFractalRows * view.fractal_columns;
  groups.count = weight.size(0);
  groups.all_rows = x.size(0);
  groups.matrix = view.column_blocks * groups.product.block;
  groups.ends = a.list_type == 0;
  groups.list = a.list->data();
  groups.list_type = a.list->dtype;
  auto scratch = std::make_shared<std::vector<float>>(groups.product.scratch());
  return [groups, scratch] { groups.run(scratch->data()); };
}

}  // namespace aclnn::prepared
