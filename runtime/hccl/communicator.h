// One rank's end of a communicator, and the two ways to move data on it: rounds, in which every rank takes
// part, and lanes between two ranks.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "hccl/hccl.h"
#include "runtime/hccl/segment.h"

namespace host_runtime::hccl {

/// What Operation::kind is for MoE dispatch and combine, beside HCCL's own kinds.
constexpr uint32_t kExpertDispatch = 1001;
constexpr uint32_t kExpertCombine = 1002;

/// What a communicator is used for: operators of experts want one for themselves.
enum class Use { kNone, kCollectives, kExperts };

/// One collective operation, as the round engine runs it. A round moves at most one slot per rank.
class Exchange {
 public:
  virtual ~Exchange() = default;
  /// What all ranks must agree on. The engine sets `serial`.
  virtual Operation operation() const = 0;
  /// Puts this rank's contribution to `round` into its slot.
  virtual void fill(uint64_t round, std::byte* slot) = 0;
  /// Takes what this rank needs of `round` out of the slots, one per rank.
  virtual void drain(uint64_t round, const std::vector<const std::byte*>& slots) = 0;
};

/// One message to or from a peer.
struct Message {
  bool send;
  uint32_t peer;
  std::byte* buffer;
  uint64_t bytes;
  HcclDataType type;
};

struct CommunicatorOptions {
  std::string name;  // empty: made from the segment's name
  std::chrono::seconds exec_timeout{1836};
  uint64_t buffer_bytes = uint64_t{200} << 20;
};

class Communicator {
 public:
  /// Joins as `rank` without waiting for the others. Throws Error.
  Communicator(const std::string& segment, uint32_t ranks, uint32_t rank, const CommunicatorOptions& options);
  ~Communicator();

  uint32_t rank() const { return segment_.rank(); }
  uint32_t size() const { return segment_.ranks(); }
  const std::string& name() const { return name_; }
  const std::string& segment_name() const { return segment_name_; }
  std::chrono::seconds exec_timeout() const { return exec_timeout_; }
  uint64_t buffer_bytes() const { return buffer_bytes_; }
  HcclResult async_error() const { return async_error_.load(); }
  void wait_for_all(std::chrono::milliseconds timeout) { segment_.wait_for_all(timeout); }

  /// Says what is about to be launched. Throws Error if it can't share the communicator with what was.
  void claim(Use use);

  /// Runs one collective operation to its end. `label` is its name in messages. Throws TaskError.
  void run(Exchange& exchange, const char* label);

  /// Sends and receives all messages, in whatever order the peers come. Messages between the same two ranks
  /// keep their order. Returns when every message has been taken by its receiver. Throws TaskError.
  void transfer(const std::vector<Message>& messages, const char* label);

  /// How many sub-communicators with this key were made so far; counted equally on all ranks.
  uint64_t next_sub_communicator(const std::string& key);

 private:
  struct Progress;
  void throw_if_failed() const;
  [[noreturn]] void fail(aclError code, HcclResult result, const std::string& text);
  [[noreturn]] void fail_wait(const WaitFailure& failure, const char* label);
  void check_agreement(uint64_t round, const char* label);
  void check_counts(uint64_t round, const char* label);
  void wait_posted(uint64_t round);
  void wait_consumed(uint64_t round);
  void post(uint64_t round);
  bool advance(Progress& progress, const char* label);
  bool advance_send(Progress& progress);
  bool advance_receive(Progress& progress, const char* label);

  std::string segment_name_;
  std::string name_;
  std::chrono::seconds exec_timeout_;
  uint64_t buffer_bytes_;
  Segment segment_;
  std::atomic<Use> use_{Use::kNone};
  std::atomic<HcclResult> async_error_{HCCL_SUCCESS};
  std::mutex order_;  // one collective at a time
  uint64_t round_ = 0;
  uint64_t serial_ = 0;
  std::mutex lanes_;  // one batch of messages at a time
  std::mutex sub_;
  std::vector<std::pair<std::string, uint64_t>> sub_communicators_;
};
using CommunicatorPtr = std::shared_ptr<Communicator>;

/// "HcclAllReduce(count 16, float32, sum)".
std::string describe_operation(const Operation& operation);

}  // namespace host_runtime::hccl
