// Mixture-of-experts routing and grouped matmuls, computed with ATen on the stream.
#pragma once

#include "runtime/aclnn/aten.h"

namespace aclnn::fused {

using OptionalTensor = std::optional<at::Tensor>;

/// aclnnMoeGatingTopKSoftmax: y = the k largest of softmax(x) [.., k]; row_idx[r, j] = j * rows + r. Rows
/// that are `finished` get the expert number (one behind the last).
void gating_top_k_softmax(const at::Tensor& x, const OptionalTensor& finished, int64_t k, at::Tensor& y,
                          at::Tensor& expert_idx, at::Tensor& row_idx);
/// aclnnMoeGatingTopKSoftmaxV2: renorm 0 takes the k largest of softmax(x), renorm 1 softmax over the k
/// largest of x.
void gating_top_k_softmax_v2(const at::Tensor& x, const OptionalTensor& finished, int64_t k, int64_t renorm,
                             bool with_softmax, at::Tensor& y, at::Tensor& expert_idx, at::Tensor& softmax);

struct GatingTopK {
  int64_t k, k_group, group_count, group_select_mode, renorm, norm_type;
  bool out_flag;
  double routed_scaling_factor, eps;
};
/// aclnnMoeGatingTopK: softmax (norm_type 0) or sigmoid (1), biased choice of groups and then experts,
/// unbiased weights.
void gating_top_k(const at::Tensor& x, const OptionalTensor& bias, const GatingTopK& options, at::Tensor& y,
                  at::Tensor& expert_idx, at::Tensor& out);

struct InitRouting {
  int64_t active_num, expert_capacity, expert_num, drop_pad_mode;
  int64_t count_type;  ///< expert_tokens: 0 cumulative, 1 counts, 2 [expert, count] pairs; -1 none
  int64_t quant_mode;  ///< -1 none, 0 static, 1 dynamic
  int64_t first_expert, last_expert;
  int64_t row_idx_type;  ///< 0: where each row went; 1: which row came
};
/// aclnnMoeInitRoutingV3: rows of x sorted by expert (stable), experts outside [first, last) left out.
void init_routing(const at::Tensor& x, const at::Tensor& expert_idx, const OptionalTensor& scale,
                  const OptionalTensor& offset, const InitRouting& options, at::Tensor& expanded_x,
                  at::Tensor& expanded_row_idx, at::Tensor& expert_tokens, at::Tensor& expanded_scale);

/// aclnnMoeFinalizeRoutingV2: out[i] = skip1[i] + skip2[i] + sum_k scales[i, k] * (rows[row(i, k)] +
/// bias[expert(i, k)]). Modes 0 and 1: row indices lie column by column (k * rows + i), 2 and 3: row by row;
/// 1 and 3: -1 marks dropped rows.
void finalize_routing(const at::Tensor& rows, const at::Tensor& row_index, const OptionalTensor& skip1,
                      const OptionalTensor& skip2, const OptionalTensor& bias, const OptionalTensor& scales,
                      const OptionalTensor& experts, int64_t mode, at::Tensor& out);

void token_permute(const at::Tensor& tokens, const at::Tensor& indices, int64_t num_out_tokens,
                   at::Tensor& permuted, at::Tensor& sorted_indices);
void token_unpermute(const at::Tensor& permuted, const at::Tensor& sorted_indices,
                     const OptionalTensor& probs, at::Tensor& tokens);
/// out[e] = how many entries of the sorted list are at most e.
void compute_expert_tokens(const at::Tensor& sorted_experts, at::Tensor& out);

struct GroupedMatmul {
  std::vector<at::Tensor> x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale;
  OptionalTensor group_list;
  int64_t split_item, group_type, group_list_type, act_type;
};
/// aclnnGroupedMatmulV4/V5/WeightNz: rows of x in groups, each with its own weight [K, N]. Floating point,
/// int8 with scales (per channel, per token), and int8 weights with float x (antiquant).
void grouped_matmul(const GroupedMatmul& arguments, std::vector<at::Tensor>& out);

/// aclnnApplyTopKTopP: keeps the k[i] largest logits of row i, then the smallest set of those whose
/// probability reaches p[i]; the rest becomes -inf.
void apply_top_k_top_p(const at::Tensor& logits, const OptionalTensor& p, const OptionalTensor& k,
                       at::Tensor& out);

}  // namespace aclnn::fused
