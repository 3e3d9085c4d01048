// The shared memory of one communicator: a control block, per-rank state and staging slots, and one mailbox
// (lane) for each ordered pair of ranks. A fresh segment is all zero bytes, which is every field's valid
// first state.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace host_runtime::hccl {

constexpr uint32_t kMaxRanks = 64;
constexpr size_t kSlotBytes = size_t{1} << 20;
constexpr size_t kLaneBytes = size_t{128} << 10;

/// What one rank says it is running; equal on all ranks except `bytes_to`.
struct Operation {
  uint32_t kind;       // HcclCMDType
  uint32_t data_type;  // HcclDataType
  uint32_t reduction;  // HcclReduceOp, or HCCL_REDUCE_RESERVED
  uint32_t root;
  uint32_t experts;  // of an exchange of experts' rows
  uint64_t tokens;   // the same: most of all ranks
  uint64_t count;    // elements (of a row, for experts); 0 when the counts differ between ranks
  uint64_t serial;   // how many operations the rank ran on this communicator before
  uint64_t rounds;   // rounds that the rank itself needs
  uint64_t bytes_to[kMaxRanks];
  uint64_t bytes_from[kMaxRanks];
};

struct alignas(64) RankState {
  std::atomic<int32_t> pid;
  std::atomic<uint64_t> started;  // start time of the process, so that a reused pid is told apart
  std::atomic<uint32_t> left;     // the rank destroyed its communicator
  alignas(64) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> sleepers;
  alignas(64) std::atomic<uint64_t> posted;    // last round whose contribution lies in the slot
  alignas(64) std::atomic<uint64_t> consumed;  // last round whose peers' slots were read
  alignas(64) Operation operations[2];         // by parity of the operation's first round
};

/// A mailbox from one rank to another: two chunks in flight.
struct alignas(64) Lane {
  struct Chunk {
    uint64_t message_bytes;
    uint32_t data_type;
    uint32_t bytes;
  };
  std::atomic<uint64_t> sent;
  alignas(64) std::atomic<uint64_t> taken;
  alignas(64) Chunk chunks[2];
  alignas(64) std::byte data[2][kLaneBytes];
};

struct alignas(64) Control {
  std::atomic<uint32_t> ranks;  // set by the first rank; others must agree
  std::atomic<uint32_t> attached;
  std::atomic<uint32_t> ready;
  std::atomic<uint32_t> failure;  // 0 none, 1 being written, 2 valid
  uint32_t failure_code;          // aclError
  char failure_text[1024];
};

/// Who a waiting rank waits for, and why a wait ended badly.
struct WaitFailure {
  enum class Reason { kDead, kLeft, kTimeout, kPeerFailed };
  Reason reason;
  uint32_t rank;
};

/// One process's mapping of the segment, as one rank.
class Segment {
 public:
  /// Opens or creates the segment `name` for `ranks` ranks and claims `rank`. Throws Error.
  Segment(const std::string& name, uint32_t ranks, uint32_t rank);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  /// Waits until every rank attached; the name is gone from the file system afterwards. Throws Error that
  /// names the ranks that are missing after `timeout`.
  void wait_for_all(std::chrono::milliseconds timeout);

  uint32_t ranks() const { return ranks_; }
  uint32_t rank() const { return rank_; }
  RankState& state(uint32_t rank) const { return states_[rank]; }
  std::byte* slot(uint32_t rank, uint64_t round) const {
    return slots_ + (size_t{rank} * 2 + (round & 1)) * kSlotBytes;
  }
  Lane& lane(uint32_t from, uint32_t to) const { return lanes_[size_t{from} * ranks_ + to]; }
  Control& control() const { return *control_; }

  void ring(uint32_t rank) const;
  void ring_all() const;

  using Predicate = std::function<bool()>;
  using Missing = std::function<std::vector<uint32_t>()>;
  /// Waits until `ready()`: spins briefly, then sleeps. `missing` lists the ranks that have not come yet.
  /// Throws WaitFailure when one of them died or left, when another rank failed, or after `timeout` (0:
  /// never).
  template <class Ready, class Waiting>
  void wait(const Ready& ready, const Waiting& missing, std::chrono::milliseconds timeout) const {
    if (!spin(ready)) sleep_until(ready, missing, timeout);
  }

  /// "rank 1 (pid 4711)".
  std::string describe(uint32_t rank) const;
  bool alive(uint32_t rank) const;

 private:
  template <class Ready>
  static bool spin(const Ready& ready) {
    for (int i = 0; i < kSpins; ++i) {
      if (ready()) return true;
      pause(i);
    }
    return ready();
  }
  static void pause(int iteration);
  void sleep_until(const Predicate& ready, const Missing& missing, std::chrono::milliseconds timeout) const;
  void open(const std::string& name);
  void claim();
  static size_t total_bytes(uint32_t ranks);

  static constexpr int kSpins = 400;
  std::string name_;
  uint32_t ranks_;
  uint32_t rank_;
  void* base_ = nullptr;
  Control* control_ = nullptr;
  RankState* states_ = nullptr;
  std::byte* slots_ = nullptr;
  Lane* lanes_ = nullptr;
};

/// A name no other communicator has: "/npu_compiler_hccl_<pid>_<random>".
std::string fresh_segment_name();

/// Removes segments that lie in /dev/shm though the process that named them is dead (it crashed before all
/// ranks came).
void remove_abandoned_segments();

/// Removes the segment `name` if a process that joined it is dead: a rank table gives every run the same
/// name, and an earlier run may have crashed before all its ranks came.
void remove_stale_segment(const std::string& name);

}  // namespace host_runtime::hccl
