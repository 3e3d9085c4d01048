#include <ATen/core/ATen_fwd.h>

#include "runtime/aclnn/prepared.h"
#include "runtime/aclnn/prepared_support.h"
#include "runtime/kernels/index.h"

namespace aclnn::prepared {
namespace {

/// A tensor as slices along one dimension: the rest of its shape, the step from slice to slice.
struct Slices {
  Dims shape;
  Dims strides;
  int64_t stride;
};

Slices slices_along(const Tensor& tensor, int64_t axis) {
  Slices slices{{}, {}, tensor.strides[axis]};
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (i == axis) continue;
    slices.shape.push_back(tensor.shape[i]);
    slices.strides.push_back(tensor.strides[i]);
  }
  return slices;
}

std::optional<int64_t> axis_of(const Tensor& tensor, int64_t dim) {
  if (dim < -tensor.dim() || dim >= tensor.dim()) return std::nullopt;
  return dim < 0 ? dim + tensor.dim() : dim;
}

bool is_index(const Tensor& tensor) {
  return tensor.dtype == c10::ScalarType::Long || tensor.dtype == c10::ScalarType::Int;
}

/// Makes the dimensions axis .. axis + count - 1 one (none: a new one of size 1). False when they don't lie
/// one behind the other.
bool merge(Tensor& tensor, int64_t axis, int64_t count) {
  Dims shape, strides;
  int64_t size = 1, stride = 0;
  for (int64_t i = axis; i < axis + count; ++i) {
    if (size != 1 && tensor.shape[i] != 1 && stride != tensor.shape[i] * tensor.strides[i]) return false;
    if (tensor.shape[i] != 1) stride = tensor.strides[i];
    size *= tensor.shape[i];
  }
  for (int64_t i = 0; i <= tensor.dim(); ++i) {
    if (i == axis) {
      shape.push_back(size);
      strides.push_back(stride);
    }
    if (i < tensor.dim() && (i < axis || i >= axis + count)) {
      shape.push_back(tensor.shape[i]);
      strides.push_back(tensor.strides[i]);
    }
  }
  tensor.shape = shape;
  tensor.strides = strides;
  return true;
}

/// The plain facts of a tensor, to be reshaped.
void describe_as(Tensor& copy, const Tensor& tensor) {
  copy.shape = tensor.shape;
  copy.strides = tensor.strides;
  copy.offset = tensor.offset;
  copy.dtype = tensor.dtype;
  copy.storage = tensor.storage;
}

/// Slices of `from` to slices of `to`; positions apply to `to` with `writes_at_positions`, else to `from`.
Work move(const Tensor& to, const Tensor& from, int64_t axis, const Tensor& index, bool writes_at_positions,
          bool negative) {
  if (!is_index(index) || index.dim() > 1 || to.dtype != from.dtype || to.dim() != from.dim()) return nullptr;
  const int64_t count = index.numel();
  const Tensor& stepped = writes_at_positions ? from : to;
  if (stepped.shape[axis] != count && stepped.shape[axis] != 1) return nullptr;
  const Slices target = slices_along(to, axis), source = slices_along(from, axis);
  if (target.shape != source.shape) return nullptr;
  const auto nest = nest_of<2>(target.shape, {target.strides, source.strides});
  if (!nest) return nullptr;
  const auto item = static_cast<int64_t>(to.itemsize());
  const auto kernel = kernels::copy_kernel(item, *nest);
  if (kernel == nullptr) return nullptr;
  kernels::SliceMove arguments{};
  arguments.slice = {to.data(), from.data(), 0, *nest};
  arguments.kernel = kernel;
  arguments.positions = {index.data(), index.dtype == c10::ScalarType::Long, negative,
                         (writes_at_positions ? to : from).shape[axis]};
  arguments.position_step = index.dim() == 1 ? index.strides[0] : 0;
  arguments.count = count;
  arguments.writes_at_positions = writes_at_positions;
  arguments.to_stride = target.stride * item;
  arguments.from_stride = source.stride * item;
  // A single slice of values is written to every position.
  if (stepped.shape[axis] == 1 && count != 1) {
    if (!writes_at_positions) return nullptr;
    arguments.from_stride = 0;
  }
  return bind(kernels::move_slices, arguments);
}

/// `index` flattened and the matching dimensions of `out` merged into one.
Work select(const Tensor& self, int64_t axis, const Tensor& index, const Tensor& out, bool negative) {
  if (!index.is_contiguous() && index.dim() > 1) return nullptr;
  if (out.dim() != self.dim() - 1 + index.dim()) return nullptr;
  Tensor merged, flat;
  describe_as(merged, out);
  describe_as(flat, index);
  if (!merge(merged, axis, index.dim())) return nullptr;
  if (index.dim() > 1) {
    flat.shape.clear();
    flat.strides.clear();
    flat.shape.push_back(index.numel());
    flat.strides.push_back(1);
  }
  return move(merged, self, axis, flat, false, negative);
}

/// The only index of an advanced indexing, and its dimension.
struct OnlyIndex {
  const Tensor* tensor;
  int64_t axis;
};
std::optional<OnlyIndex> only_index(const Tensor& self, const TensorList& indices) {
  std::optional<OnlyIndex> only;
  for (size_t i = 0; i < indices.size(); ++i) {
    const Tensor* index = indices.tensors[i].get();
    if (index == nullptr) continue;
    // op-plugin says `:` with a tensor of no elements; an index that is itself empty selects nothing.
    if (index->dim() == 1 && index->numel() == 0) continue;
    if (only) return std::nullopt;
    only = OnlyIndex{index, static_cast<int64_t>(i)};
  }
  if (!only || only->axis >= self.dim()) return std::nullopt;
  return only;
}

Work move_elements(const Tensor& indexed, const Tensor& other, int64_t dim, const Tensor& index,
                   bool scatters) {
  const auto axis = axis_of(indexed, dim);
  if (!axis || !is_index(index) || indexed.dtype != other.dtype) return nullptr;
  if (index.dim() != indexed.dim() || index.shape != other.shape) return nullptr;
  for (int64_t i = 0; i < indexed.dim(); ++i) {
    if (i != *axis && index.shape[i] > indexed.shape[i]) return nullptr;
  }
  Dims still = first_dims(indexed.strides, indexed.strides.size());
  still[*axis] = 0;
  const auto nest = scatters ? nest_of<3>(index.shape, {still, other.strides, index.strides})
                             : nest_of<3>(index.shape, {other.strides, still, index.strides});
  if (!nest) return nullptr;
  const Tensor& to = scatters ? indexed : other;
  const Tensor& from = scatters ? other : indexed;
  const kernels::Positions positions{index.data(), index.dtype == c10::ScalarType::Long, false,
                                     indexed.shape[*axis]};
  return bind(kernels::element_move_kernel(static_cast<int64_t>(to.itemsize()), scatters),
              {to.data(), from.data(), positions, indexed.strides[*axis], *nest});
}

}  // namespace

Work index_select(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& out) {
  const auto axis = axis_of(self, dim);
  if (!axis || index.dim() > 1 || out.dim() != self.dim()) return nullptr;
  return move(out, self, *axis, index, false, false);
}

Work embedding(const Tensor& weight, const Tensor& indices, const Tensor& out) {
  return weight.dim() == 2 ? select(weight, 0, indices, out, false) : nullptr;
}

Work index(const Tensor& self, const TensorList& indices, const Tensor& out) {
  const auto only = only_index(self, indices);
  return only ? select(self, only->axis, *only->tensor, out, true) : nullptr;
}

Work index_put(const Tensor& self, const TensorList& indices, const Tensor& values, bool accumulate) {
  const auto only = only_index(self, indices);
  if (!only || accumulate || only->tensor->dim() != 1) return nullptr;
  // The values broadcast to self with the index in place of the dimension.
  Dims shape = first_dims(self.shape, self.shape.size());
  shape[only->axis] = only->tensor->numel();
  const auto strides = broadcast_strides(values, shape);
  if (!strides) return nullptr;
  Tensor expanded;
  describe_as(expanded, values);
  expanded.shape = shape;
  expanded.strides = *strides;
  return move(self, expanded, only->axis, *only->tensor, true, true);
}

Work index_copy(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source) {
  const auto axis = axis_of(self, dim);
  if (!axis || source.dim() != self.dim() || source.shape[*axis] != index.numel()) return nullptr;
  return move(self, source, *axis, index, true, false);
}

Work scatter(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source, int64_t reduction) {
  return reduction == 0 ? move_elements(self, source, dim, index, true) : nullptr;
}

Work gather(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& out) {
  return move_elements(self, out, dim, index, false);
}

}  // namespace aclnn::prepared
