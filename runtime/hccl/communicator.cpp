#include "runtime/hccl/communicator.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "runtime/hccl/data_type.h"
#include "runtime/hccl/errors.h"

namespace host_runtime::hccl {
namespace {

const char* call_name(uint32_t kind) {
  switch (kind) {
    case HCCL_CMD_BROADCAST:
      return "HcclBroadcast";
    case HCCL_CMD_ALLREDUCE:
      return "HcclAllReduce";
    case HCCL_CMD_REDUCE:
      return "HcclReduce";
    case HCCL_CMD_ALLGATHER:
      return "HcclAllGather";
    case HCCL_CMD_ALLGATHER_V:
      return "HcclAllGatherV";
    case HCCL_CMD_REDUCE_SCATTER:
      return "HcclReduceScatter";
    case HCCL_CMD_REDUCE_SCATTER_V:
      return "HcclReduceScatterV";
    case HCCL_CMD_ALLTOALL:
      return "HcclAlltoAll";
    case HCCL_CMD_ALLTOALLV:
      return "HcclAlltoAllV";
    case HCCL_CMD_ALLTOALLVC:
      return "HcclAlltoAllVC";
    case HCCL_CMD_SCATTER:
      return "HcclScatter";
    case HCCL_CMD_BARRIER:
      return "HcclBarrier";
    case kExpertDispatch:
      return "aclnnMoeDistributeDispatchV2";
    case kExpertCombine:
      return "aclnnMoeDistributeCombineV2";
    default:
      return "unknown operation";
  }
}

bool rooted(uint32_t kind) {
  return kind == HCCL_CMD_BROADCAST || kind == HCCL_CMD_REDUCE || kind == HCCL_CMD_SCATTER;
}

bool has_counts_per_rank(uint32_t kind) {
  return kind == HCCL_CMD_ALLGATHER_V || kind == HCCL_CMD_REDUCE_SCATTER_V || kind == HCCL_CMD_ALLTOALL ||
         kind == HCCL_CMD_ALLTOALLV || kind == HCCL_CMD_ALLTOALLVC;
}

bool agree(const Operation& a, const Operation& b) {
  return a.kind == b.kind && a.data_type == b.data_type && a.reduction == b.reduction && a.root == b.root &&
         a.count == b.count && a.experts == b.experts && a.tokens == b.tokens;
}

std::string describe_experts(const Operation& operation) {
  return std::string(call_name(operation.kind)) + "(" + std::to_string(operation.experts) + " experts, " +
         std::to_string(operation.tokens) + " tokens of all ranks, rows of " +
         std::to_string(operation.count) + " " + data_type_name(operation.data_type) + ")";
}

}  // namespace

std::string describe_operation(const Operation& operation) {
  std::string text = call_name(operation.kind);
  if (operation.kind == HCCL_CMD_BARRIER) return text;
  if (operation.kind == kExpertDispatch || operation.kind == kExpertCombine)
    return describe_experts(operation);
  text += "(";
  if (!has_counts_per_rank(operation.kind)) text += "count " + std::to_string(operation.count) + ", ";
  text += data_type_name(operation.data_type);
  if (operation.reduction != HCCL_REDUCE_RESERVED) text += ", " + reduction_name(operation.reduction);
  if (rooted(operation.kind)) text += ", root " + std::to_string(operation.root);
  return text + ")";
}

Communicator::Communicator(const std::string& segment, uint32_t ranks, uint32_t rank,
                           const CommunicatorOptions& options)
    : segment_name_(segment),
      name_(options.name.empty() ? segment.substr(1) : options.name),
      exec_timeout_(options.exec_timeout),
      buffer_bytes_(options.buffer_bytes),
      segment_(segment, ranks, rank) {}

Communicator::~Communicator() = default;

void Communicator::claim(Use use) {
  Use before = Use::kNone;
  if (use_.compare_exchange_strong(before, use) || before == use) return;
  throw Error(
      HCCL_E_NOT_SUPPORT,
      "communicator " + name_ + " has run " +
          (before == Use::kExperts ? "aclnnMoeDistributeDispatchV2 or CombineV2" : "other operators") +
          " before: their page wants a communicator for the two alone. Make one more process group of "
          "the same ranks");
}

void Communicator::throw_if_failed() const {
  const Control& control = segment_.control();
  if (control.failure.load() == 2) {
    throw TaskError(static_cast<aclError>(control.failure_code), control.failure_text);
  }
}

void Communicator::fail(aclError code, HcclResult result, const std::string& text) {
  Control& control = segment_.control();
  uint32_t none = 0;
  const std::string whole = "communicator " + name_ + ": " + text;
  if (control.failure.compare_exchange_strong(none, 1)) {
    control.failure_code = static_cast<uint32_t>(code);
    std::snprintf(control.failure_text, sizeof(control.failure_text), "%s", whole.c_str());
    control.failure.store(2);
  }
  async_error_.store(result);
  segment_.ring_all();
  throw TaskError(code, whole);
}

void Communicator::fail_wait(const WaitFailure& failure, const char* label) {
  const std::string who = segment_.describe(failure.rank);
  const std::string here = std::string(label) + " on " + segment_.describe(rank());
  switch (failure.reason) {
    case WaitFailure::Reason::kPeerFailed:
      async_error_.store(HCCL_E_REMOTE);
      throw_if_failed();
      [[fallthrough]];
    case WaitFailure::Reason::kDead:
      fail(ACL_ERROR_RT_FFTS_PLUS_TIMEOUT, HCCL_E_REMOTE,
           here + " cannot finish: " + who +
               " is dead. Look for the error that ended it, then restart all ranks");
    case WaitFailure::Reason::kLeft:
      fail(ACL_ERROR_RT_FFTS_PLUS_TIMEOUT, HCCL_E_REMOTE,
           here + " cannot finish: " + who +
               " has destroyed the communicator without taking part. All ranks must run " +
               "the same collectives in the same order");
    case WaitFailure::Reason::kTimeout:
      break;
  }
  const RankState& late = segment_.state(failure.rank);
  fail(ACL_ERROR_RT_FFTS_PLUS_TIMEOUT, HCCL_E_TIMEOUT,
       here + " waited " + std::to_string(exec_timeout_.count()) + " s (HCCL_EXEC_TIMEOUT) for " + who +
           ", which is alive but has not come: it is at round " + std::to_string(late.posted.load()) +
           ", this rank at round " + std::to_string(segment_.state(rank()).posted.load()) +
           ". Either it runs other work or another collective, or the timeout is too short");
}

void Communicator::wait_posted(uint64_t round) {
  auto ready = [this, round] {
    for (uint32_t peer = 0; peer < size(); ++peer) {
      if (segment_.state(peer).posted.load(std::memory_order_acquire) < round) return false;
    }
    return true;
  };
  auto missing = [this, round] {
    std::vector<uint32_t> late;
    for (uint32_t peer = 0; peer < size(); ++peer) {
      if (segment_.state(peer).posted.load() < round) late.push_back(peer);
    }
    return late;
  };
  segment_.wait(ready, missing, exec_timeout_);
}

void Communicator::wait_consumed(uint64_t round) {
  auto ready = [this, round] {
    for (uint32_t peer = 0; peer < size(); ++peer) {
      if (segment_.state(peer).consumed.load(std::memory_order_acquire) < round) return false;
    }
    return true;
  };
  auto missing = [this, round] {
    std::vector<uint32_t> late;
    for (uint32_t peer = 0; peer < size(); ++peer) {
      if (segment_.state(peer).consumed.load() < round) late.push_back(peer);
    }
    return late;
  };
  segment_.wait(ready, missing, exec_timeout_);
}

void Communicator::post(uint64_t round) {
  segment_.state(rank()).posted.store(round, std::memory_order_release);
  segment_.ring_all();
}

void Communicator::check_agreement(uint64_t round, const char* label) {
  const Operation& mine = segment_.state(rank()).operations[round & 1];
  for (uint32_t peer = 0; peer < size(); ++peer) {
    const Operation& theirs = segment_.state(peer).operations[round & 1];
    if (agree(mine, theirs)) continue;
    fail(ACL_ERROR_RT_FFTS_PLUS_EXCEPTION, HCCL_E_PARA,
         "the ranks run different collectives as their number " + std::to_string(mine.serial) + ": " +
             segment_.describe(rank()) + " runs " + describe_operation(mine) + ", " +
             segment_.describe(peer) + " runs " + describe_operation(theirs) +
             ". All ranks must run the same collectives in the same order");
  }
  if (has_counts_per_rank(mine.kind)) check_counts(round, label);
}

// Every rank looks at all pairs, so that all of them fail in the same operation.
void Communicator::check_counts(uint64_t round, const char* label) {
  for (uint32_t sender = 0; sender < size(); ++sender) {
    const Operation& from = segment_.state(sender).operations[round & 1];
    for (uint32_t receiver = 0; receiver < size(); ++receiver) {
      const Operation& to = segment_.state(receiver).operations[round & 1];
      if (from.bytes_to[receiver] == to.bytes_from[sender]) continue;
      fail(ACL_ERROR_RT_FFTS_PLUS_EXCEPTION, HCCL_E_PARA,
           std::string(label) + ": " + segment_.describe(sender) + " sends " +
               std::to_string(from.bytes_to[receiver]) + " bytes to " + segment_.describe(receiver) +
               ", which expects " + std::to_string(to.bytes_from[sender]) +
               " bytes from it. The receive counts must mirror the peers' send counts");
    }
  }
}

void Communicator::run(Exchange& exchange, const char* label) {
  const std::lock_guard<std::mutex> one_at_a_time(order_);
  throw_if_failed();
  RankState& mine = segment_.state(rank());
  std::vector<const std::byte*> slots(size());
  try {
    const uint64_t first = round_ + 1;
    if (first > 2) wait_consumed(first - 2);
    Operation& announced = mine.operations[first & 1];
    announced = exchange.operation();
    announced.serial = ++serial_;
    exchange.fill(0, segment_.slot(rank(), first));
    post(first);
    wait_posted(first);
    check_agreement(first, label);
    uint64_t total = 1;
    for (uint32_t peer = 0; peer < size(); ++peer) {
      total = std::max(total, segment_.state(peer).operations[first & 1].rounds);
    }
    for (uint64_t index = 0; index < total; ++index) {
      const uint64_t round = first + index;
      if (index + 1 < total) {  // the next contribution is under way while the peers still read this one
        if (round > 1) wait_consumed(round - 1);
        exchange.fill(index + 1, segment_.slot(rank(), round + 1));
        post(round + 1);
      }
      if (index > 0) wait_posted(round);
      for (uint32_t peer = 0; peer < size(); ++peer) slots[peer] = segment_.slot(peer, round);
      exchange.drain(index, slots);
      mine.consumed.store(round, std::memory_order_release);
      segment_.ring_all();
    }
    round_ += total;
  } catch (const WaitFailure& failure) {
    fail_wait(failure, label);
  }
}

uint64_t Communicator::next_sub_communicator(const std::string& key) {
  const std::lock_guard<std::mutex> guard(sub_);
  for (auto& [known, count] : sub_communicators_) {
    if (known == key) return ++count;
  }
  sub_communicators_.emplace_back(key, 0);
  return 0;
}

}  // namespace host_runtime::hccl
