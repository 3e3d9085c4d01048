#include "runtime/acl/fetch_ahead.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "runtime/acl/graph.h"

namespace host_runtime {
namespace {

/// What of a weight is fetched before its product: until the product's own fetching ahead has caught up.
constexpr size_t kBeginning = 16 << 10;

/// What first() may fill of the second-level cache: the rest is for what a replay computes with.
size_t room() {
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return bytes <= 0 ? 0 : static_cast<size_t>(bytes) / 4 * 3;
}

bool overlap(const MemoryAccess& a, const MemoryAccess& b) {
  const auto *first = static_cast<const char*>(a.address), *second = static_cast<const char*>(b.address);
  return first < second + b.bytes && second < first + a.bytes;
}

/// What the nodes read from its first byte to its last and never write, by node.
std::vector<std::pair<size_t, MemoryAccess>> weights_of(const std::deque<Node>& nodes) {
  std::vector<std::pair<size_t, MemoryAccess>> weights;
  std::vector<MemoryAccess> written;
  for (const Node& node : nodes) {
    for (const MemoryAccess& access : node.task->accesses()) {
      if (access.whole) weights.emplace_back(node.index, access);
      if (access.mode != MemoryAccess::Mode::kRead) written.push_back(access);
    }
  }
  const auto is_written = [&](const auto& weight) {
    return std::any_of(written.begin(), written.end(),
                       [&](const MemoryAccess& other) { return overlap(weight.second, other); });
  };
  weights.erase(std::remove_if(weights.begin(), weights.end(), is_written), weights.end());
  return weights;
}

}  // namespace

std::shared_ptr<const FetchAhead> FetchAhead::of(const std::deque<Node>& nodes) {
  const auto weights = weights_of(nodes);
  if (weights.empty()) return nullptr;
  auto result = std::make_shared<FetchAhead>();
  result->next_.resize(nodes.size());
  size_t left = room();
  for (const auto& [node, weight] : weights) {
    const auto* address = static_cast<const char*>(weight.address);
    if (node > 0) result->next_[node - 1] = {address, std::min(weight.bytes, kBeginning)};
    const auto same = [address](const Weight& other) { return other.address == address; };
    if (std::any_of(result->first_.begin(), result->first_.end(), same)) continue;  // read by several nodes
    const size_t taken = std::min(left, weight.bytes);
    if (taken > 0) result->first_.push_back({address, taken});
    left -= taken;
  }
  return result;
}

}  // namespace host_runtime
