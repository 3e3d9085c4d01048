// aclnnTransposeBatchMatMul: constraints as in ops-nn matmul/transpose_batch_mat_mul.
#include <array>

#include "runtime/aclnn/operator.h"
#include "runtime/aclnn/prepared.h"

namespace aclnn::prepared {
namespace {

constexpr int64_t kLimit = 65536;

TensorRef permuted(const Tensor& tensor, at::IntArrayRef order) {
  auto view = c10::make_intrusive<aclTensor>(tensor);
  for (size_t i = 0; i < order.size(); ++i) {
    view->shape[i] = tensor.shape[order[i]];
    view->strides[i] = tensor.strides[order[i]];
  }
  return view;
}

void check_order(const Call& call, const char* name, at::IntArrayRef order,
                 std::initializer_list<std::array<int64_t, 3>> allowed) {
  std::string known;
  for (const auto& candidate : allowed) {
    if (order == at::IntArrayRef(candidate)) return;
    known += (known.empty() ? "" : " or ") + describe(at::IntArrayRef(candidate));
  }
  call.refuse(name, "has to be " + known + ", not " + describe(order));
}

void check(const Call& call, const TransposeMatmul& a) {
  check_order(call, "permX1", a.perm_x1, {{0, 1, 2}, {1, 0, 2}});
  check_order(call, "permX2", a.perm_x2, {{0, 1, 2}, {0, 2, 1}});
  check_order(call, "permY", a.perm_y, {{1, 0, 2}});
  const bool batch_first = a.perm_x1[0] == 0;
  const int64_t batches = a.x1->shape[a.perm_x1[0]], rows = a.x1->shape[a.perm_x1[1]], inner = a.x1->shape[2];
  const int64_t columns = a.x2->shape[a.perm_x2[2]];
  if (a.x2->shape[0] != batches || a.x2->shape[a.perm_x2[1]] != inner)
    call.refuse("x2", "has to have " + std::to_string(batches) + " batches of " + std::to_string(inner) +
                          " rows in the order of permX2, not " + describe(*a.x2));
  if (batches < 1 || batches >= kLimit || columns < 1 || columns >= kLimit)
    call.refuse("x2", "has to have 1 to 65535 batches and columns, not " + describe(*a.x2));
  if (batch_first && inner >= kLimit)
    call.refuse("x1", "has to have at most 65535 columns for permX1 [0, 1, 2], not " + describe(*a.x1));
  const int64_t split = a.batch_split;
  if (split < 1 || split > batches || batches % split != 0)
    call.refuse("batchSplitFactor",
                "has to divide the " + std::to_string(batches) + " batches, but is " + std::to_string(split));
  const bool restricted = a.perm_x2[1] == 2 || (!batch_first && batches * inner >= kLimit);
  if (restricted && (split != 1 || batch_first))
    call.refuse(
        "batchSplitFactor",
        "has to be 1 and permX1 [1, 0, 2] for permX2 [0, 2, 1], and for more than 65535 columns over all "
        "batches");
  const Dims shape = split == 1 ? Dims{rows, batches, columns} : Dims{split, rows, batches / split * columns};
  if (a.out->shape != shape)
    call.refuse("out", "has to have shape " + describe(shape) + ", not " + describe(a.out->shape));
}

}  // namespace

Work transpose_matmul(const Call& call, const TransposeMatmul& a) {
  check(call, a);
  if (a.batch_split != 1 || !a.x1->is_plain() || !a.x2->is_plain() || !a.out->is_plain()) return nullptr;
  return matmul(*permuted(*a.x1, a.perm_x1), *permuted(*a.x2, a.perm_x2), *permuted(*a.out, {1, 0, 2}));
}

}  // namespace aclnn::prepared
