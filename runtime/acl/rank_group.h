// Communicators under the names that HcclGetCommName gives: libhccl publishes them, and operators of libopapi
// that are fused with a collective find them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "runtime/acl/task.h"

namespace host_runtime {

class HOST_RUNTIME_API RankGroup {
 public:
  virtual ~RankGroup() = default;
  virtual uint32_t size() const = 0;
  /// Sums `count` elements of `buffer` over all ranks, in place, as part of a task: every rank has to run it.
  /// It may run any number of times and keeps the communicator alive. Throws TaskError.
  virtual std::function<void()> all_reduce_sum(void* buffer, uint64_t count, aclDataType type,
                                               const char* label) const = 0;
};
using RankGroupPtr = std::shared_ptr<const RankGroup>;

/// A name that is published twice stands for the newer group.
HOST_RUNTIME_API void publish_group(const std::string& name, RankGroupPtr group);
HOST_RUNTIME_API void withdraw_group(const std::string& name);
/// nullptr when there is no group of that name.
HOST_RUNTIME_API RankGroupPtr find_group(const std::string& name);

}  // namespace host_runtime
