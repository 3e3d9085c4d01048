// An exchange of parts whose sizes only their senders know.
#pragma once

#include "runtime/acl/rank_group.h"
#include "runtime/hccl/communicator.h"

namespace host_runtime::hccl {

/// parts[r] goes to rank r, behind its size; a receiver learns the size with the first round.
class SizedParts final : public Exchange {
 public:
  /// `parts` has to outlive the exchange.
  SizedParts(const Operation& announced, uint32_t rank, const Parts& parts);
  Operation operation() const override { return announced_; }
  void fill(uint64_t round, std::byte* slot) override;
  void drain(uint64_t round, const std::vector<const std::byte*>& slots) override;
  /// What came from each rank, once the exchange has run.
  Parts received() && { return std::move(received_); }

 private:
  /// Which bytes of a part of `bytes` a round moves, and where they lie in the slot's part.
  struct Piece {
    uint64_t from, bytes, at;
  };
  Piece piece(uint64_t round, uint64_t bytes) const;

  Operation announced_;
  uint32_t rank_;
  const Parts& parts_;
  Parts received_;
  uint64_t per_round_;
};

}  // namespace host_runtime::hccl
