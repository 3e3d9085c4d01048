// The collective operations as exchanges, and the stream tasks that run them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/acl/task.h"
#include "runtime/hccl/communicator.h"

namespace host_runtime::hccl {

/// Part of a buffer, in bytes.
struct Range {
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

/// An exchange that a task can run again and again, and what it touches.
class Collective : public Exchange {
 public:
  explicit Collective(const Operation& announced) : announced_(announced) {}
  Operation operation() const override { return announced_; }
  virtual std::vector<MemoryAccess> accesses() const = 0;

 protected:
  Operation announced_;
};

/// A slot is divided between the ranks; parts start on cache lines, so elements are never split.
uint64_t part_bytes(size_t ranks);

/// What `kind` announces before counts are added: one round, nothing sent.
Operation announce(HcclCMDType kind, HcclDataType type, uint64_t count);

/// HcclAllReduce and HcclReduce: `count` elements of every rank are reduced. `out` is null on ranks that get
/// no result.
std::unique_ptr<Collective> make_reduce(Operation announced, const void* in, void* out);

/// HcclAllGather(V), HcclBroadcast, HcclBarrier: rank r's `mine` lands in everybody's `out` at parts[r].
std::unique_ptr<Collective> make_gather(Operation announced, const void* mine, void* out, uint32_t rank,
                                        std::vector<Range> parts);

/// HcclAlltoAll(V, VC), HcclScatter: in[to[r]] goes to rank r, from[r] of `out` comes from it.
std::unique_ptr<Collective> make_exchange_parts(Operation announced, const void* in, void* out, uint32_t rank,
                                                std::vector<Range> to, std::vector<Range> from);

/// HcclReduceScatter(V): parts[r] of all ranks' `in` is reduced into rank r's `out`.
std::unique_ptr<Collective> make_reduce_parts(Operation announced, const void* in, void* out, uint32_t rank,
                                              std::vector<Range> parts);

/// The stream task of a collective.
class CollectiveTask : public Task {
 public:
  CollectiveTask(CommunicatorPtr communicator, std::unique_ptr<Collective> collective, std::string name)
      : communicator_(std::move(communicator)), collective_(std::move(collective)), name_(std::move(name)) {
    communicator_->claim(Use::kCollectives);
  }
  void run() override { communicator_->run(*collective_, name_.c_str()); }
  std::string name() const override { return name_; }
  std::vector<MemoryAccess> accesses() const override { return collective_->accesses(); }
  std::string arguments_json() const override;

 private:
  CommunicatorPtr communicator_;
  std::unique_ptr<Collective> collective_;
  std::string name_;
};

/// The stream task of sends and receives.
class MessageTask : public Task {
 public:
  MessageTask(CommunicatorPtr communicator, std::vector<Message> messages, std::string name)
      : communicator_(std::move(communicator)), messages_(std::move(messages)), name_(std::move(name)) {
    communicator_->claim(Use::kCollectives);
  }
  void run() override { communicator_->transfer(messages_, name_.c_str()); }
  std::string name() const override { return name_; }
  std::vector<MemoryAccess> accesses() const override;
  std::string arguments_json() const override;

 private:
  CommunicatorPtr communicator_;
  std::vector<Message> messages_;
  std::string name_;
};

}  // namespace host_runtime::hccl
