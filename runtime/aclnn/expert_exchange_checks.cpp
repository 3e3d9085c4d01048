// What the pages of aclnnMoeDistributeDispatchV2 and CombineV2 allow, by family of chips.
#include <algorithm>
#include <vector>

#include "runtime/aclnn/expert_exchange.h"
#include "runtime/aclnn/fused_support.h"

namespace aclnn::fused {
namespace {

constexpr int64_t kMostChoices = 16;  // experts of a token

/// The documented limits of one family of chips.
struct Limits {
  const char* name;    ///< of the family
  const char* prefix;  ///< of its SoC names
  std::vector<int64_t> worlds;
  int64_t most_ranks;  ///< where `worlds` is empty: 2 to this many
  int64_t most_tokens, least_hidden, most_hidden, hidden_step, most_experts;
  int64_t experts_each;  ///< 0: no limit
};

const Limits& limits_of(const Call& call) {
  static const std::vector<Limits> all = {
      {"A2", "Ascend910B", {16, 32, 64, 128, 256}, 0, 256, 32, 7168, 32, 512, 24},
      {"A3", "Ascend910_93", {}, 768, 512, 1024, 8192, 1, 1024, 0},
  };
  const std::string soc = aclrtGetSocName();
  for (const Limits& limits : all) {
    if (soc.rfind(limits.prefix, 0) == 0) return limits;
  }
  call.refuse("groupEp", "is of an operator that Atlas A2 and A3 have, and this chip is " + soc);
}

void require_between(const Call& call, const char* name, const std::string& what, int64_t value, int64_t low,
                     int64_t high, const Limits& limits) {
  if (value < low || value > high)
    call.refuse(name, what + " has to be " + std::to_string(low) + " to " + std::to_string(high) + " on " +
                          limits.name + ", not " + std::to_string(value));
}

void check_ranks(const Call& call, const ExpertWorld& w, const Limits& limits) {
  if (limits.worlds.empty()) {
    require_between(call, "epWorldSize", "(ranks)", w.ranks, 2, limits.most_ranks, limits);
  } else if (std::find(limits.worlds.begin(), limits.worlds.end(), w.ranks) == limits.worlds.end()) {
    call.refuse("epWorldSize", "has to be one of " + describe(limits.worlds) + " on " + limits.name +
                                   ", not " + std::to_string(w.ranks));
  }
  if (w.rank < 0 || w.rank >= w.ranks)
    call.refuse("epRankId",
                "has to be 0 to " + std::to_string(w.ranks - 1) + ", not " + std::to_string(w.rank));
  if (w.tp_ranks > 1) call.refuse("tpWorldSize", "of more than 1 is not implemented by the host runtime");
  if (w.shard_type != 0) call.refuse("expertShardType", "has to be 0, the only documented value");
  if (w.shared_ranks != 0)
    call.refuse("sharedExpertRankNum",
                "has to be 0: ranks of shared experts are not implemented by the host runtime");
  if (w.shared_experts < 0 || w.shared_experts > 1)
    call.refuse("sharedExpertNum", "has to be 0 or 1 where no rank has shared experts only, not " +
                                       std::to_string(w.shared_experts));
  if (!w.algorithm.empty() && (limits.worlds.empty() || w.algorithm != "fullmesh"))
    call.refuse("commAlg",
                "\"" + w.algorithm + "\" is " +
                    (limits.worlds.empty() ? "not supported on A3" : "not implemented by the host runtime"));
}

void check_experts(const Call& call, const ExpertWorld& w, int64_t top_k, const Limits& limits) {
  require_between(call, "moeExpertNum", "(experts)", w.experts, 1, limits.most_experts, limits);
  if (w.experts % w.ranks != 0)
    call.refuse("moeExpertNum", "has to be a multiple of the ranks: " + std::to_string(w.experts) +
                                    " experts, " + std::to_string(w.ranks) + " ranks");
  if (limits.experts_each > 0 && w.experts_each() > limits.experts_each)
    call.refuse("moeExpertNum", "has to give a rank at most " + std::to_string(limits.experts_each) +
                                    " experts on " + limits.name + ", not " +
                                    std::to_string(w.experts_each()));
  require_between(call, "expertIds", "(experts of a token)", top_k, 1, std::min(kMostChoices, w.experts),
                  limits);
}

int64_t aligned(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

/// What the pages ask of HCCL_BUFFSIZE, in bytes.
int64_t buffer_need(const ExpertWorld& w, int64_t each, int64_t top_k, int64_t hidden, int64_t header,
                    const Limits& limits) {
  constexpr int64_t kMiB = int64_t{1} << 20;
  if (!limits.worlds.empty())
    return 2 * (each * w.ranks * std::min(w.experts_each(), top_k) * hidden * 2 + 2 * kMiB);
  return 2 * (w.experts_each() * each * w.ranks * aligned(aligned(2 * hidden, 32) + header, 512) +
              (top_k + w.shared_experts) * each * aligned(2 * hidden, 512));
}

}  // namespace

host_runtime::RankGroupPtr check_world(const Call& call, const ExpertWorld& w, int64_t tokens, int64_t top_k,
                                       int64_t hidden, int64_t header) {
  const Limits& limits = limits_of(call);
  check_ranks(call, w, limits);
  check_experts(call, w, top_k, limits);
  require_between(call, "x", "(tokens of a rank)", tokens, 1, limits.most_tokens, limits);
  require_between(call, "x", "(elements of a row)", hidden, limits.least_hidden, limits.most_hidden, limits);
  if (hidden % limits.hidden_step != 0)
    call.refuse("x", "has to have rows of a multiple of " + std::to_string(limits.hidden_step) +
                         " elements on " + limits.name + ", not " + std::to_string(hidden));
  if (w.tokens != 0 && (w.tokens % w.ranks != 0 || w.tokens < tokens * w.ranks))
    call.refuse("globalBs", "has to be 0 or the most tokens of a rank times " + std::to_string(w.ranks) +
                                ", not " + std::to_string(w.tokens));
  const host_runtime::RankGroupPtr group = host_runtime::find_group(w.group);
  if (group == nullptr)
    call.refuse("groupEp", "names no communicator of this process: \"" + w.group +
                               "\"; pass get_hccl_comm_name(rank) of the process group's npu backend");
  if (group->size() != w.ranks || group->rank() != w.rank)
    call.refuse("groupEp", "has " + std::to_string(group->size()) + " ranks, of which this is " +
                               std::to_string(group->rank()) + "; epWorldSize is " + std::to_string(w.ranks) +
                               " and epRankId " + std::to_string(w.rank));
  const int64_t each = w.tokens == 0 ? tokens : w.tokens / w.ranks;
  const int64_t need = buffer_need(w, each, top_k, hidden, header, limits);
  if (static_cast<uint64_t>(need) > group->buffer_bytes())
    call.refuse("groupEp", "has a buffer of " + std::to_string(group->buffer_bytes() >> 20) +
                               " MiB and needs " + std::to_string((need >> 20) + 1) +
                               ": set HCCL_BUFFSIZE to that, on all ranks");
  try {
    group->keep_for_experts();
  } catch (const std::exception& error) {
    call.refuse("groupEp", error.what());
  }
  return group;
}

void check_active(const Call& call, const Tensor* active, const ExpertWorld& w, int64_t tokens,
                  int64_t top_k) {
  if (active == nullptr) return;
  require_dtype(call, "xActiveMask", *active, c10::ScalarType::Bool);
  require_rank(call, "xActiveMask", *active, 1, limits_of(call).worlds.empty() ? 2 : 1);
  const Dims shape = active->dim() == 1 ? Dims{tokens} : Dims{tokens, top_k};
  require_shape(call, "xActiveMask", *active, shape);
  if (w.tokens != 0 && w.tokens != tokens * w.ranks)
    call.refuse("xActiveMask", "has to be left out where ranks have different numbers of tokens");
}

int64_t most_rows(const ExpertWorld& w, int64_t tokens, int64_t top_k) {
  return (w.tokens == 0 ? tokens * w.ranks : w.tokens) * std::min(w.experts_each(), top_k);
}

}  // namespace aclnn::fused
