#include "runtime/hccl/sized_parts.h"

#include <algorithm>
#include <cstring>

#include "runtime/hccl/collectives.h"

namespace host_runtime::hccl {
namespace {

constexpr uint64_t kHeader = sizeof(uint64_t);  // of the first round: how many bytes the part has

}  // namespace

SizedParts::SizedParts(const Operation& announced, uint32_t rank, const Parts& parts)
    : announced_(announced),
      rank_(rank),
      parts_(parts),
      received_(parts.size()),
      per_round_(part_bytes(parts.size())) {
  uint64_t longest = 0;
  for (const auto& part : parts) longest = std::max<uint64_t>(longest, part.size());
  announced_.rounds = (longest + kHeader + per_round_ - 1) / per_round_;
}

SizedParts::Piece SizedParts::piece(uint64_t round, uint64_t bytes) const {
  const uint64_t first = per_round_ - kHeader;
  if (round == 0) return {0, std::min(bytes, first), kHeader};
  const uint64_t from = std::min(bytes, first + (round - 1) * per_round_);
  return {from, std::min(bytes - from, per_round_), 0};
}

void SizedParts::fill(uint64_t round, std::byte* slot) {
  for (size_t peer = 0; peer < parts_.size(); ++peer) {
    std::byte* out = slot + peer * per_round_;
    const uint64_t bytes = parts_[peer].size();
    if (round == 0) std::memcpy(out, &bytes, kHeader);
    const Piece moved = piece(round, bytes);
    if (moved.bytes > 0) std::memcpy(out + moved.at, parts_[peer].data() + moved.from, moved.bytes);
  }
}

void SizedParts::drain(uint64_t round, const std::vector<const std::byte*>& slots) {
  for (size_t peer = 0; peer < slots.size(); ++peer) {
    const std::byte* in = slots[peer] + rank_ * per_round_;
    if (round == 0) {
      uint64_t bytes = 0;
      std::memcpy(&bytes, in, kHeader);
      received_[peer].resize(bytes);
    }
    const Piece moved = piece(round, received_[peer].size());
    if (moved.bytes > 0) std::memcpy(received_[peer].data() + moved.from, in + moved.at, moved.bytes);
  }
}

}  // namespace host_runtime::hccl
