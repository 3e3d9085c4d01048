#include "runtime/acl/fetch_ahead.h"

#include <unistd.h>

#include <algorithm>
#include <set>

#include "runtime/acl/graph.h"

namespace host_runtime {
namespace {

size_t cache_bytes(int level) {
  const long bytes = sysconf(level);
  return bytes <= 0 ? 0 : static_cast<size_t>(bytes);
}

/// What first() may fill of the second-level cache: the rest is for what a replay computes with.
size_t room() { return cache_bytes(_SC_LEVEL2_CACHE_SIZE) / 4 * 3; }

/// Weights that stay in the last-level cache. Of a large one others have their share: a virtual machine is
/// told of all of it.
size_t kept_in_last_cache() {
  constexpr size_t kMost = size_t{64} << 20;
  return std::min(kMost, cache_bytes(_SC_LEVEL3_CACHE_SIZE) / 2);
}

bool overlap(const MemoryAccess& a, const MemoryAccess& b) {
  const auto *first = static_cast<const char*>(a.address), *second = static_cast<const char*>(b.address);
  return first < second + b.bytes && second < first + a.bytes;
}

/// What the nodes read from its first byte to its last and never write, in their order.
std::vector<MemoryAccess> weights_of(const std::deque<Node>& nodes) {
  std::vector<MemoryAccess> weights, written;
  for (const Node& node : nodes) {
    for (const MemoryAccess& access : node.task->accesses()) {
      if (access.whole) weights.push_back(access);
      if (access.mode != MemoryAccess::Mode::kRead) written.push_back(access);
    }
  }
  const auto is_written = [&](const MemoryAccess& weight) {
    return std::any_of(written.begin(), written.end(),
                       [&](const MemoryAccess& other) { return overlap(weight, other); });
  };
  weights.erase(std::remove_if(weights.begin(), weights.end(), is_written), weights.end());
  return weights;
}

}  // namespace

std::shared_ptr<const FetchAhead> FetchAhead::of(const std::deque<Node>& nodes) {
  const auto weights = weights_of(nodes);
  if (weights.empty()) return nullptr;
  auto result = std::make_shared<FetchAhead>();
  size_t left = room(), total = 0;
  std::set<const void*> seen;
  for (const MemoryAccess& weight : weights) {
    if (!seen.insert(weight.address).second) continue;  // read by several nodes
    const auto* address = static_cast<const char*>(weight.address);
    total += weight.bytes;
    const size_t taken = std::min(left, weight.bytes);
    if (taken > 0) result->first_.push_back({address, taken});
    left -= taken;
  }
  result->stay_cached_ = total <= kept_in_last_cache();
  return result;
}

}  // namespace host_runtime
