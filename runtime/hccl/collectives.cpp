#include "runtime/hccl/collectives.h"

#include <algorithm>
#include <cstring>

#include "runtime/hccl/data_type.h"
#include "runtime/hccl/reduction.h"

namespace host_runtime::hccl {
namespace {

const std::byte* bytes_of(const void* address) { return static_cast<const std::byte*>(address); }
std::byte* bytes_of(void* address) { return static_cast<std::byte*>(address); }

uint64_t rounds_for(uint64_t bytes, uint64_t per_round) {
  return std::max<uint64_t>(1, (bytes + per_round - 1) / per_round);
}

/// The piece of `whole` that round `index` moves when each round moves `per_round` bytes; empty past the end.
Range piece(const Range& whole, uint64_t index, uint64_t per_round) {
  const uint64_t start = index * per_round;
  if (start >= whole.bytes) return {whole.offset + whole.bytes, 0};
  return {whole.offset + start, std::min(per_round, whole.bytes - start)};
}

uint64_t longest(const std::vector<Range>& ranges) {
  uint64_t bytes = 0;
  for (const Range& range : ranges) bytes = std::max(bytes, range.bytes);
  return bytes;
}

/// The smallest range that holds all of them.
MemoryAccess hull(const void* base, const std::vector<Range>& ranges, MemoryAccess::Mode mode) {
  uint64_t low = UINT64_MAX;
  uint64_t high = 0;
  for (const Range& range : ranges) {
    if (range.bytes == 0) continue;
    low = std::min(low, range.offset);
    high = std::max(high, range.offset + range.bytes);
  }
  if (high == 0) return {base, 0, mode};
  return {bytes_of(base) + low, high - low, mode};
}

class Reduce : public Collective {
 public:
  Reduce(Operation announced, const void* in, void* out)
      : Collective(announced), in_(bytes_of(in)), out_(bytes_of(out)) {
    all_.bytes = announced.count * element_bytes(type());
    announced_.rounds = rounds_for(all_.bytes, kSlotBytes);
  }
  void fill(uint64_t round, std::byte* slot) override {
    const Range part = piece(all_, round, kSlotBytes);
    if (part.bytes > 0) std::memcpy(slot, in_ + part.offset, part.bytes);
  }
  void drain(uint64_t round, const std::vector<const std::byte*>& slots) override {
    const Range part = piece(all_, round, kSlotBytes);
    if (out_ == nullptr || part.bytes == 0) return;
    const std::vector<const void*> sources(slots.begin(), slots.end());
    reduce(type(), static_cast<HcclReduceOp>(announced_.reduction), sources, out_ + part.offset,
           part.bytes / element_bytes(type()));
  }
  std::vector<MemoryAccess> accesses() const override {
    std::vector<MemoryAccess> all{{in_, all_.bytes, MemoryAccess::Mode::kRead}};
    if (out_ != nullptr) all.push_back({out_, all_.bytes, MemoryAccess::Mode::kWrite});
    return all;
  }

 private:
  HcclDataType type() const { return static_cast<HcclDataType>(announced_.data_type); }
  const std::byte* in_;
  std::byte* out_;
  Range all_;
};

class Gather : public Collective {
 public:
  Gather(Operation announced, const void* mine, void* out, uint32_t rank, std::vector<Range> parts)
      : Collective(announced),
        mine_(bytes_of(mine)),
        out_(bytes_of(out)),
        rank_(rank),
        parts_(std::move(parts)) {
    announced_.rounds = rounds_for(longest(parts_), kSlotBytes);
  }
  void fill(uint64_t round, std::byte* slot) override {
    const Range part = piece({0, parts_[rank_].bytes}, round, kSlotBytes);
    if (part.bytes > 0) std::memcpy(slot, mine_ + part.offset, part.bytes);
  }
  void drain(uint64_t round, const std::vector<const std::byte*>& slots) override {
    for (uint32_t peer = 0; peer < slots.size(); ++peer) {
      if (peer == rank_ && out_ + parts_[peer].offset == mine_) continue;
      const Range part = piece(parts_[peer], round, kSlotBytes);
      if (part.bytes > 0) std::memcpy(out_ + part.offset, slots[peer], part.bytes);
    }
  }
  std::vector<MemoryAccess> accesses() const override {
    std::vector<Range> written = parts_;
    if (out_ + parts_[rank_].offset == mine_) written[rank_].bytes = 0;
    return {{mine_, parts_[rank_].bytes, MemoryAccess::Mode::kRead},
            hull(out_, written, MemoryAccess::Mode::kWrite)};
  }

 private:
  const std::byte* mine_;
  std::byte* out_;
  uint32_t rank_;
  std::vector<Range> parts_;
};

class ExchangeParts : public Collective {
 public:
  ExchangeParts(Operation announced, const void* in, void* out, uint32_t rank, std::vector<Range> to,
                std::vector<Range> from)
      : Collective(announced),
        in_(bytes_of(in)),
        out_(bytes_of(out)),
        rank_(rank),
        to_(std::move(to)),
        from_(std::move(from)),
        per_round_(part_bytes(to_.size())) {
    for (size_t peer = 0; peer < to_.size(); ++peer) {
      announced_.bytes_to[peer] = to_[peer].bytes;
      announced_.bytes_from[peer] = from_[peer].bytes;
    }
    announced_.rounds = rounds_for(std::max(longest(to_), longest(from_)), per_round_);
  }
  void fill(uint64_t round, std::byte* slot) override {
    for (size_t peer = 0; peer < to_.size(); ++peer) {
      const Range part = piece(to_[peer], round, per_round_);
      if (part.bytes > 0) std::memcpy(slot + peer * per_round_, in_ + part.offset, part.bytes);
    }
  }
  void drain(uint64_t round, const std::vector<const std::byte*>& slots) override {
    for (size_t peer = 0; peer < from_.size(); ++peer) {
      const Range part = piece(from_[peer], round, per_round_);
      if (part.bytes > 0) std::memcpy(out_ + part.offset, slots[peer] + rank_ * per_round_, part.bytes);
    }
  }
  std::vector<MemoryAccess> accesses() const override {
    return {hull(in_, to_, MemoryAccess::Mode::kRead), hull(out_, from_, MemoryAccess::Mode::kWrite)};
  }

 private:
  const std::byte* in_;
  std::byte* out_;
  uint32_t rank_;
  std::vector<Range> to_;
  std::vector<Range> from_;
  uint64_t per_round_;
};

class ReduceParts : public Collective {
 public:
  ReduceParts(Operation announced, const void* in, void* out, uint32_t rank, std::vector<Range> parts)
      : Collective(announced),
        in_(bytes_of(in)),
        out_(bytes_of(out)),
        rank_(rank),
        parts_(std::move(parts)),
        per_round_(part_bytes(parts_.size())) {
    announced_.rounds = rounds_for(longest(parts_), per_round_);
  }
  void fill(uint64_t round, std::byte* slot) override {
    for (size_t peer = 0; peer < parts_.size(); ++peer) {
      const Range part = piece(parts_[peer], round, per_round_);
      if (part.bytes > 0) std::memcpy(slot + peer * per_round_, in_ + part.offset, part.bytes);
    }
  }
  void drain(uint64_t round, const std::vector<const std::byte*>& slots) override {
    const Range part = piece({0, parts_[rank_].bytes}, round, per_round_);
    if (part.bytes == 0) return;
    std::vector<const void*> sources;
    for (const std::byte* slot : slots) sources.push_back(slot + rank_ * per_round_);
    const auto type = static_cast<HcclDataType>(announced_.data_type);
    reduce(type, static_cast<HcclReduceOp>(announced_.reduction), sources, out_ + part.offset,
           part.bytes / element_bytes(type));
  }
  std::vector<MemoryAccess> accesses() const override {
    return {hull(in_, parts_, MemoryAccess::Mode::kRead),
            {out_, parts_[rank_].bytes, MemoryAccess::Mode::kWrite}};
  }

 private:
  const std::byte* in_;
  std::byte* out_;
  uint32_t rank_;
  std::vector<Range> parts_;
  uint64_t per_round_;
};

std::string json_of(const Communicator& communicator) {
  return "\"communicator\": \"" + communicator.name() +
         "\", \"rank\": " + std::to_string(communicator.rank()) +
         ", \"ranks\": " + std::to_string(communicator.size());
}

}  // namespace

uint64_t part_bytes(size_t ranks) { return kSlotBytes / ranks / 64 * 64; }

Operation announce(HcclCMDType kind, HcclDataType type, uint64_t count) {
  Operation operation{};
  operation.kind = kind;
  operation.data_type = type;
  operation.reduction = HCCL_REDUCE_RESERVED;
  operation.count = count;
  operation.rounds = 1;
  return operation;
}

std::unique_ptr<Collective> make_reduce(Operation announced, const void* in, void* out) {
  return std::make_unique<Reduce>(announced, in, out);
}

std::unique_ptr<Collective> make_gather(Operation announced, const void* mine, void* out, uint32_t rank,
                                        std::vector<Range> parts) {
  return std::make_unique<Gather>(announced, mine, out, rank, std::move(parts));
}

std::unique_ptr<Collective> make_exchange_parts(Operation announced, const void* in, void* out, uint32_t rank,
                                                std::vector<Range> to, std::vector<Range> from) {
  return std::make_unique<ExchangeParts>(announced, in, out, rank, std::move(to), std::move(from));
}

std::unique_ptr<Collective> make_reduce_parts(Operation announced, const void* in, void* out, uint32_t rank,
                                              std::vector<Range> parts) {
  return std::make_unique<ReduceParts>(announced, in, out, rank, std::move(parts));
}

std::string CollectiveTask::arguments_json() const {
  return "{" + json_of(*communicator_) + ", \"operation\": \"" +
         describe_operation(collective_->operation()) + "\"}";
}

std::vector<MemoryAccess> MessageTask::accesses() const {
  std::vector<MemoryAccess> all;
  for (const Message& message : messages_) {
    all.push_back({message.buffer, message.bytes,
                   message.send ? MemoryAccess::Mode::kRead : MemoryAccess::Mode::kWrite});
  }
  return all;
}

std::string MessageTask::arguments_json() const {
  std::string text = "{" + json_of(*communicator_) + ", \"messages\": [";
  for (size_t i = 0; i < messages_.size(); ++i) {
    const Message& message = messages_[i];
    text += std::string(i == 0 ? "" : ", ") + "{\"" + (message.send ? "to" : "from") +
            "\": " + std::to_string(message.peer) + ", \"bytes\": " + std::to_string(message.bytes) +
            ", \"dtype\": \"" + data_type_name(message.type) + "\"}";
  }
  return text + "]}";
}

}  // namespace host_runtime::hccl
