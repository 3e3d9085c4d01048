#include "runtime/aclnn/moe_operators.h"

#include <limits>

#include "runtime/aclnn/quant_operators.h"

namespace aclnn::fused {
namespace {

/// The k largest of each row in descending order; of equal values the one with the lower index first.
std::pair<at::Tensor, at::Tensor> top_k(const at::Tensor& values, int64_t k) {
  auto [sorted, order] = at::sort(values, /*stable=*/true, -1, /*descending=*/true);
  return {sorted.narrow(-1, 0, k), order.narrow(-1, 0, k)};
}

void mark_finished(const OptionalTensor& finished, int64_t experts, at::Tensor& expert_idx) {
  if (finished) expert_idx.masked_fill_(finished->unsqueeze(-1), experts);
}

/// Ends of the groups of `total` rows, from a group list of any type.
std::vector<std::pair<int64_t, int64_t>> groups_of(const at::Tensor& list, int64_t type, int64_t groups) {
  const at::Tensor values = list.to(at::kLong).contiguous();
  const auto* data = values.const_data_ptr<int64_t>();
  std::vector<std::pair<int64_t, int64_t>> result(static_cast<size_t>(groups), {0, 0});
  int64_t start = 0;
  const int64_t entries = type == 2 ? values.size(0) : values.numel();
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t group = type == 2 ? data[2 * i] : i;
    const int64_t end = type == 0 ? data[i] : start + data[type == 2 ? 2 * i + 1 : i];
    TORCH_CHECK(group >= 0 && group < groups && end >= start, "group_list entry ", i, " (type ", type,
                ") gives rows ", start, " to ", end, " of group ", group, ", but there are ", groups,
                " groups and rows must not go back");
    result[static_cast<size_t>(group)] = {start, end};
    start = end;
  }
  return result;
}

at::Tensor slice_of(const std::vector<at::Tensor>& list, int64_t group) {
  if (list.empty() || !list[0].defined() || list[0].numel() == 0) return {};
  if (list.size() > 1) return list[static_cast<size_t>(group)];
  return list[0].dim() > 1 ? list[0][group] : list[0];
}

/// One group: x [m, K] and weight [K, N], with what the group has of bias and scales.
at::Tensor group_product(const GroupedMatmul& a, const at::Tensor& x, at::Tensor weight, int64_t group,
                         const at::Tensor& token_scale, at::ScalarType out_type) {
  const at::Tensor bias = slice_of(a.bias, group);
  if (x.scalar_type() == at::kChar) {
    at::Tensor product = int8_product(x, weight);
    if (bias.defined() && bias.scalar_type() == at::kInt) product = product + bias;
    if (out_type == at::kInt) return product;
    at::Tensor result = product.to(at::kFloat) * channel_scale(slice_of(a.scale, group));
    if (token_scale.defined()) result = result * token_scale.to(at::kFloat).unsqueeze(-1);
    if (bias.defined() && bias.scalar_type() != at::kInt) result = result + bias.to(at::kFloat);
    return result.to(out_type);
  }
  if (weight.scalar_type() == at::kChar) {
    weight = weight.to(at::kFloat);
    const at::Tensor offset = slice_of(a.antiquant_offset, group);
    if (offset.defined()) weight = weight + offset.to(at::kFloat);
    weight = weight * slice_of(a.antiquant_scale, group).to(at::kFloat);
  }
  at::Tensor result = at::matmul(x.to(at::kFloat), weight.to(at::kFloat));
  if (bias.defined()) result = result + bias.to(at::kFloat);
  return result.to(out_type);
}

}  // namespace

void gating_top_k_softmax(const at::Tensor& x, const OptionalTensor& finished, int64_t k, at::Tensor& y,
                          at::Tensor& expert_idx, at::Tensor& row_idx) {
  const auto [values, order] = top_k(at::softmax(x.to(at::kFloat), -1), k);
  y.copy_(values);
  expert_idx.copy_(order);
  mark_finished(finished, x.size(-1), expert_idx);
  const int64_t rows = y.numel() / std::max<int64_t>(k, 1);
  row_idx.copy_(at::arange(rows * k, at::kInt).view({k, rows}).t().reshape(row_idx.sizes()));
}

void gating_top_k_softmax_v2(const at::Tensor& x, const OptionalTensor& finished, int64_t k, int64_t renorm,
                             bool with_softmax, at::Tensor& y, at::Tensor& expert_idx, at::Tensor& softmax) {
  const at::Tensor floats = x.to(at::kFloat);
  const at::Tensor probabilities = at::softmax(floats, -1);
  const auto [values, order] = top_k(renorm == 1 ? floats : probabilities, k);
  y.copy_(renorm == 1 ? at::softmax(values, -1) : values);
  expert_idx.copy_(order);
  mark_finished(finished, x.size(-1), expert_idx);
  if (with_softmax && renorm == 0 && softmax.defined() && softmax.numel() > 0) softmax.copy_(probabilities);
}

void gating_top_k(const at::Tensor& x, const OptionalTensor& bias, const GatingTopK& o, at::Tensor& y,
                  at::Tensor& expert_idx, at::Tensor& out) {
  const int64_t rows = x.size(0);
  const int64_t experts = x.size(1);
  const at::Tensor floats = x.to(at::kFloat);
  const at::Tensor normed = o.norm_type == 0 ? at::softmax(floats, -1) : at::sigmoid(floats);
  at::Tensor choice = bias ? normed + bias->to(at::kFloat) : normed;
  if (o.group_count > 1) {
    const at::Tensor grouped = choice.view({rows, o.group_count, experts / o.group_count});
    const at::Tensor score =
        o.group_select_mode == 0 ? grouped.amax(-1) : std::get<0>(at::topk(grouped, 2, -1)).sum(-1);
    const at::Tensor left_out =
        at::ones({rows, o.group_count}, at::kBool).scatter_(1, top_k(score, o.k_group).second, false);
    choice = grouped.masked_fill(left_out.unsqueeze(-1), -std::numeric_limits<double>::infinity())
                 .view({rows, experts});
  }
  const at::Tensor order = top_k(choice, o.k).second;
  at::Tensor weights = normed.gather(1, order);
  if (o.norm_type == 1) weights = weights / (weights.sum(-1, true) + o.eps);
  y.copy_(weights * o.routed_scaling_factor);
  expert_idx.copy_(order);
  if (o.out_flag) out.copy_(normed);
}

void init_routing(const at::Tensor& x, const at::Tensor& expert_idx, const OptionalTensor& scale,
                  const OptionalTensor& offset, const InitRouting& o, at::Tensor& expanded_x,
                  at::Tensor& expanded_row_idx, at::Tensor& expert_tokens, at::Tensor& expanded_scale) {
  const int64_t k = expert_idx.size(1);
  const at::Tensor flat = expert_idx.to(at::kLong).reshape({-1});
  const at::Tensor outside = (flat < o.first_expert).logical_or(flat >= o.last_expert);
  const auto [sorted, order] =
      at::sort(flat.masked_fill(outside, std::numeric_limits<int64_t>::max()), true, 0, false);
  int64_t kept = flat.numel() - outside.sum().item<int64_t>();
  if (o.active_num > 0) kept = std::min(kept, o.active_num);
  const at::Tensor source = order.narrow(0, 0, kept);
  const at::Tensor experts = sorted.narrow(0, 0, kept) - o.first_expert;
  const int64_t active = o.last_expert - o.first_expert;
  const at::Tensor counts = at::bincount(experts, {}, active);
  const at::Tensor token = source.div(k, "floor");
  at::Tensor rows = x.index_select(0, token);
  at::Tensor row_scale;
  if (o.quant_mode == 0) {
    rows = quantized(rows.to(at::kFloat) * scale->to(at::kFloat) + offset->to(at::kFloat));
  } else if (o.quant_mode == 1) {
    rows = rows.to(at::kFloat);
    if (scale)
      rows = rows *
             (scale->size(0) == 1 ? scale->to(at::kFloat) : scale->to(at::kFloat).index_select(0, experts));
    std::tie(rows, row_scale) = dynamically_quantized(rows);
  } else if (scale) {
    row_scale = scale->to(at::kFloat).reshape({-1}).index_select(0, token);
  }
  at::Tensor destination = at::arange(kept, at::kLong);
  if (o.drop_pad_mode == 1) {
    // Every expert has room for expert_capacity rows; the rest of it is zeros, and rows behind it are
    // dropped.
    const at::Tensor before = counts.cumsum(0) - counts;
    const at::Tensor place = destination - before.index_select(0, experts);
    destination = at::where(place < o.expert_capacity, experts * o.expert_capacity + place, -1);
    const at::Tensor fits = destination.ge(0).nonzero().view({-1});
    expanded_x.zero_();
    expanded_x.view({-1, expanded_x.size(-1)})
        .index_copy_(0, destination.index_select(0, fits), rows.index_select(0, fits));
  } else {
    const int64_t room = std::min(kept, expanded_x.size(0));
    expanded_x.narrow(0, 0, room).copy_(rows.narrow(0, 0, room));
    if (row_scale.defined() && expanded_scale.defined() && expanded_scale.numel() > 0)
      expanded_scale.view({-1}).narrow(0, 0, room).copy_(row_scale.narrow(0, 0, room));
  }
  at::Tensor index = expanded_row_idx.view({-1});
  if (o.row_idx_type == 1) {
    index.narrow(0, 0, kept).copy_(source);
  } else {
    index.fill_(-1);
    index.index_copy_(0, source, destination.to(index.scalar_type()));
  }
  if (!expert_tokens.defined() || expert_tokens.numel() == 0) return;
  if (o.count_type == 0) {
    expert_tokens.copy_(counts.cumsum(0));
  } else if (o.count_type == 1) {
    expert_tokens.copy_(counts);
  } else if (o.count_type == 2) {
    const at::Tensor used = counts.nonzero().view({-1});
    expert_tokens.zero_();
    expert_tokens.narrow(0, 0, used.size(0))
        .copy_(at::stack({used + o.first_expert, counts.index_select(0, used)}, 1));
  }
}

void finalize_routing(const at::Tensor& rows, const at::Tensor& row_index, const OptionalTensor& skip1,
                      const OptionalTensor& skip2, const OptionalTensor& bias, const OptionalTensor& scales,
                      const OptionalTensor& experts, int64_t mode, at::Tensor& out) {
  const int64_t tokens = out.size(0);
  const int64_t k = row_index.numel() / std::max<int64_t>(tokens, 1);
  at::Tensor index = row_index.to(at::kLong);
  index = mode >= 2 ? index.view({tokens, k}) : index.view({k, tokens}).t();
  const at::Tensor flat = rows.reshape({-1, rows.size(-1)}).to(at::kFloat);
  const at::Tensor dropped = index < 0;
  TORCH_CHECK(mode == 1 || mode == 3 || !dropped.any().item<bool>(),
              "expanded_src_to_dst_row has -1, which only drop_pad_mode 1 and 3 allow");
  at::Tensor picked = flat.index_select(0, index.clamp_min(0).reshape({-1})).view({tokens, k, -1});
  picked = picked.masked_fill(dropped.unsqueeze(-1), 0.0);
  if (bias)
    picked =
        picked + bias->to(at::kFloat).index_select(0, experts->to(at::kLong).reshape({-1})).view_as(picked);
  if (scales) picked = picked * scales->to(at::kFloat).unsqueeze(-1);
  at::Tensor total = picked.sum(1);
  if (skip1) total = total + skip1->to(at::kFloat);
  if (skip2) total = total + skip2->to(at::kFloat);
  out.copy_(total);
}

void token_permute(const at::Tensor& tokens, const at::Tensor& indices, int64_t num_out_tokens,
                   at::Tensor& permuted, at::Tensor& sorted_indices) {
  const int64_t k = indices.dim() == 2 ? indices.size(1) : 1;
  const at::Tensor order = std::get<1>(at::sort(indices.reshape({-1}), true, 0, false));
  const int64_t count =
      num_out_tokens > 0 ? std::min(num_out_tokens, order.size(0)) : order.size(0) + num_out_tokens;
  permuted.copy_(tokens.index_select(0, order.narrow(0, 0, count).div(k, "floor")));
  sorted_indices.copy_(at::empty_like(order).index_copy_(0, order, at::arange(order.size(0), at::kLong)));
}

void token_unpermute(const at::Tensor& permuted, const at::Tensor& sorted_indices,
                     const OptionalTensor& probs, at::Tensor& tokens) {
  const int64_t k = probs && probs->dim() == 2 ? probs->size(1) : 1;
  const at::Tensor index = sorted_indices.to(at::kLong);
  const at::Tensor inside = index < permuted.size(0);
  at::Tensor rows = permuted.to(at::kFloat).index_select(0, index.clamp_max(permuted.size(0) - 1));
  rows = rows.masked_fill(inside.logical_not().unsqueeze(-1), 0.0).view({-1, k, permuted.size(1)});
  if (probs) rows = rows * probs->to(at::kFloat).reshape({-1, k, 1});
  tokens.copy_(rows.sum(1));
}

void compute_expert_tokens(const at::Tensor& sorted_experts, at::Tensor& out) {
  out.copy_(at::searchsorted(sorted_experts.to(at::kLong), at::arange(out.size(0), at::kLong), false,
                             /*right=*/true));
}

void grouped_matmul(const GroupedMatmul& a, std::vector<at::Tensor>& out) {
  TORCH_CHECK(a.act_type == 0, "act_type ", a.act_type, " is not implemented by the host runtime");
  if (a.group_type == -1) {
    for (size_t i = 0; i < a.x.size(); ++i) {
      const at::Tensor scale = i < a.per_token_scale.size() ? a.per_token_scale[i] : at::Tensor();
      out[i].copy_(
          group_product(a, a.x[i], a.weight[i], static_cast<int64_t>(i), scale, out[i].scalar_type()));
    }
    return;
  }
  TORCH_CHECK(a.group_type == 0, "group_type ", a.group_type,
              " is not implemented by the host runtime: 0 and -1 are");
  TORCH_CHECK(a.group_list.has_value(), "group_list is needed for group_type 0");
  const int64_t groups = a.weight.size() > 1 ? static_cast<int64_t>(a.weight.size()) : a.weight[0].size(0);
  const auto ranges = groups_of(*a.group_list, a.group_list_type, groups);
  const at::Tensor& x = a.x[0];
  for (int64_t group = 0; group < groups; ++group) {
    const auto [start, end] = ranges[static_cast<size_t>(group)];
    if (start == end) continue;
    TORCH_CHECK(end <= x.size(0), "group_list reaches row ", end, ", but x has ", x.size(0));
    const at::Tensor weight = a.weight.size() > 1 ? a.weight[static_cast<size_t>(group)] : a.weight[0][group];
    const bool with_token_scale = !a.per_token_scale.empty() && a.per_token_scale[0].defined();
    const at::Tensor scale = with_token_scale ? a.per_token_scale[0].slice(0, start, end) : at::Tensor();
    out[0]
        .slice(0, start, end)
        .copy_(group_product(a, x.slice(0, start, end), weight, group, scale, out[0].scalar_type()));
  }
}

void apply_top_k_top_p(const at::Tensor& logits, const OptionalTensor& p, const OptionalTensor& k,
                       at::Tensor& out) {
  const double nothing = -std::numeric_limits<double>::infinity();
  auto [sorted, order] = at::sort(logits.to(at::kFloat), /*stable=*/true, -1, /*descending=*/false);
  const int64_t vocabulary = logits.size(-1);
  if (k) {
    const at::Tensor first = (vocabulary - k->to(at::kLong)).clamp(0, vocabulary - 1).unsqueeze(1);
    sorted = sorted.masked_fill(sorted < sorted.gather(1, first), nothing);
  }
  if (p) {
    at::Tensor hidden = at::softmax(sorted, -1).cumsum(-1) <= (1.0 - p->to(at::kFloat)).unsqueeze(1);
    hidden.select(-1, vocabulary - 1).fill_(false);
    sorted = sorted.masked_fill(hidden, nothing);
  }
  out.copy_(at::empty_like(sorted).scatter_(-1, order, sorted));
}

}  // namespace aclnn::fused
