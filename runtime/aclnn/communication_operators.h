// Products fused with collectives: phase 1 checks the arguments and prepares one task for both.
#pragma once

#include <string>

#include "runtime/aclnn/operator.h"

namespace aclnn::fused {

/// aclnnMatmulAllReduce(V2): the sum over all ranks of x1 @ x2 + bias + x3, [.., M, K] @ [K, N].
struct MatmulAllReduce {
  const Tensor* x1 = nullptr;
  const Tensor* x2 = nullptr;
  const Tensor* bias = nullptr;
  const Tensor* x3 = nullptr;
  std::string group;  ///< as HcclGetCommName names it
  std::string reduce_op;
  int64_t comm_turn = 0;
  int64_t stream_mode = 1;
  const Tensor* output = nullptr;
};
Work matmul_all_reduce(const Call& call, const MatmulAllReduce& arguments);

}  // namespace aclnn::fused
