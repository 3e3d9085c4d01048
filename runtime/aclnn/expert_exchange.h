// MoE dispatch and combine: rows go to the ranks of their experts, and results come back. Phase 1 checks the
// arguments as the operators' pages say (ops-transformer mc2/moe_distribute_{dispatch,combine}_v2/docs) and
// prepares one task.
#pragma once

#include <string>

#include "runtime/acl/rank_group.h"
#include "runtime/aclnn/operator.h"

namespace aclnn::fused {

/// What both operators are told about ranks and experts.
struct ExpertWorld {
  std::string group;  ///< as HcclGetCommName names it
  int64_t ranks = 0, rank = 0, experts = 0;
  int64_t tp_ranks = 0, shard_type = 0, shared_experts = 0, shared_ranks = 0;
  int64_t tokens = 0;  ///< the most that a rank has, times the ranks; 0: all ranks have as many
  std::string algorithm;

  int64_t experts_each() const { return experts / ranks; }
};

/// aclnnMoeDistributeDispatchV2: the rows of this rank's experts, by expert, then by rank, then by token.
struct ExpertDispatch {
  ExpertWorld world;
  const Tensor* x = nullptr;         ///< [tokens, hidden]
  const Tensor* ids = nullptr;       ///< [tokens, k]
  const Tensor* smooth = nullptr;    ///< [experts, hidden] or null
  const Tensor* active = nullptr;    ///< [tokens] or [tokens, k] or null
  int64_t quant_mode = 0;            ///< 0 none, 2 int8 with a scale a row
  int64_t counts_type = 1;           ///< 0: sums up to each expert, 1: each expert's
  const Tensor* rows = nullptr;      ///< [A, hidden]
  const Tensor* scales = nullptr;    ///< [A]
  const Tensor* assist = nullptr;    ///< [A * 128]: of each row the rank and the place (token * k + j)
  const Tensor* counts = nullptr;    ///< [experts_each]
  const Tensor* received = nullptr;  ///< [ranks * experts_each]: rows up to each expert's of each rank
};
Work expert_dispatch(const Call& call, const ExpertDispatch& arguments);

/// aclnnMoeDistributeCombineV2: out[t] = shared[t] + sum over j of weights[t, j] * (what expert ids[t, j]
/// made of row t), summed in float32. Rows of tokens that are not active are not written.
struct ExpertCombine {
  ExpertWorld world;
  const Tensor* rows = nullptr;    ///< [A, hidden]
  const Tensor* ids = nullptr;     ///< [tokens, k]
  const Tensor* assist = nullptr;  ///< of the dispatch, as `received`
  const Tensor* received = nullptr;
  const Tensor* weights = nullptr;  ///< [tokens, k]
  const Tensor* active = nullptr;   ///< as the dispatch had it
  const Tensor* shared = nullptr;   ///< [tokens, hidden] or null
  int64_t quant_mode = 0;
  const Tensor* out = nullptr;  ///< [tokens, hidden]
};
Work expert_combine(const Call& call, const ExpertCombine& arguments);

/// Checks what both have, of a call with so many tokens of so many experts each and rows of `hidden`; gives
/// the group, which is the operators' own from now on. `header`: bytes that a row needs beside its elements.
host_runtime::RankGroupPtr check_world(const Call& call, const ExpertWorld& world, int64_t tokens,
                                       int64_t top_k, int64_t hidden, int64_t header);
/// Refuses a mask of another shape, and one of ranks that have different numbers of tokens.
void check_active(const Call& call, const Tensor* active, const ExpertWorld& world, int64_t tokens,
                  int64_t top_k);
/// The most rows that a rank may get: A of the pages.
int64_t most_rows(const ExpertWorld& world, int64_t tokens, int64_t top_k);

}  // namespace aclnn::fused
