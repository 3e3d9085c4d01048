// aclnnMatmulAllReduce: constraints as in ops-transformer mc2/matmul_all_reduce.
#include "runtime/aclnn/communication_operators.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include "runtime/acl/rank_group.h"
#include "runtime/aclnn/fused_support.h"
#include "runtime/aclnn/prepared.h"

namespace aclnn::fused {
namespace {

host_runtime::RankGroupPtr group_of(const Call& call, const MatmulAllReduce& a) {
  if (a.reduce_op != "sum") call.refuse("reduceOp", "has to be sum, not \"" + a.reduce_op + "\"");
  if (a.comm_turn != 0) call.refuse("commTurn", "has to be 0, not " + std::to_string(a.comm_turn));
  if (a.stream_mode != 1) call.refuse("streamMode", "has to be 1, not " + std::to_string(a.stream_mode));
  host_runtime::RankGroupPtr group = host_runtime::find_group(a.group);
  if (group == nullptr)
    call.refuse("group",
                "names no communicator of this process: \"" + a.group +
                    "\"; pass get_hccl_comm_name(rank) of the process group's npu backend, after a first "
                    "collective has made the communicator");
  const uint32_t ranks = group->size();
  if (ranks != 1 && ranks != 2 && ranks != 4 && ranks != 8)
    call.refuse("group", "has to have 1, 2, 4 or 8 ranks on this SoC, not " + std::to_string(ranks));
  return group;
}

void check_operands(const Call& call, const MatmulAllReduce& a) {
  if (a.x1->dtype != c10::ScalarType::Half && a.x1->dtype != c10::ScalarType::BFloat16)
    call.refuse("x1", "has to be float16 or bfloat16, not " + dtype_name(a.x1->dtype));
  require_rank(call, "x1", *a.x1, 2, 3);
  require_rank(call, "x2", *a.x2, 2, 2);
  require_contiguous(call, "x1", *a.x1);
  if (a.x1->size(-1) != a.x2->size(0))
    call.refuse("x2", "has to have " + std::to_string(a.x1->size(-1)) + " rows, as x1 has columns, not " +
                          describe(*a.x2));
  require_same_dtype(call, "x2", *a.x2, "x1", *a.x1);
  Dims shape = a.x1->shape;
  shape.back() = a.x2->size(1);
  const auto require_result = [&](const char* name, const Tensor& tensor) {
    require_same_dtype(call, name, tensor, "x1", *a.x1);
    require_shape(call, name, tensor, shape);
  };
  require_result("output", *a.output);
  require_contiguous(call, "output", *a.output);
  if (a.x3 != nullptr) require_result("x3", *a.x3);
  if (a.bias != nullptr) {
    require_same_dtype(call, "bias", *a.bias, "x1", *a.x1);
    require_shape(call, "bias", *a.bias, {a.x2->size(1)});
  }
}

/// output = x1 @ x2 + bias + x3 on this rank.
Work local_product(const MatmulAllReduce& a) {
  if (a.x3 == nullptr) {
    Work product = a.bias == nullptr
                       ? prepared::matmul(*a.x1, *a.x2, *a.output)
                       : prepared::addmm(*a.bias, *a.x1, *a.x2, at::Scalar(1), at::Scalar(1), *a.output);
    if (product) return product;
  }
  const at::Tensor x1 = view(*a.x1), x2 = view(*a.x2);
  const at::Tensor bias = a.bias == nullptr ? at::Tensor() : view(*a.bias);
  const at::Tensor x3 = a.x3 == nullptr ? at::Tensor() : view(*a.x3);
  at::Tensor output = view(*a.output);
  return [x1, x2, bias, x3, output]() mutable {
    const at::AutoDispatchBelowADInplaceOrView guard;
    if (!bias.defined() && !x3.defined()) {
      at::matmul_out(output, x1, x2);
      return;
    }
    at::Tensor sum = at::matmul(x1, x2).to(at::kFloat);
    if (bias.defined()) sum.add_(bias);
    if (x3.defined()) sum.add_(x3);
    output.copy_(sum);
  };
}

}  // namespace

Work matmul_all_reduce(const Call& call, const MatmulAllReduce& a) {
  check_operands(call, a);
  const host_runtime::RankGroupPtr group = group_of(call, a);
  Work product = local_product(a);
  const auto count = static_cast<uint64_t>(a.output->numel());
  auto reduce = group->all_reduce_sum(a.output->data(), count, a.output->acl_dtype, call.name());
  return [product = std::move(product), reduce = std::move(reduce)] {
    product();
    reduce();
  };
}

}  // namespace aclnn::fused
