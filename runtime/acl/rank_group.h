// Communicators under the names that HcclGetCommName gives: libhccl publishes them, and operators of libopapi
// that are fused with a collective find them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/acl/task.h"

namespace host_runtime {

/// What ranks send each other in one go: a part for, or from, each of them.
using Parts = std::vector<std::vector<std::byte>>;

/// An exchange of rows between the ranks of experts; has to be the same on all ranks.
struct ExpertExchange {
  bool back = false;  ///< from the experts to where the rows came from
  aclDataType type = ACL_DT_UNDEFINED;
  uint64_t hidden = 0;   ///< elements of a row
  uint32_t experts = 0;  ///< of all ranks
  uint64_t tokens = 0;   ///< most of all ranks
};

class HOST_RUNTIME_API RankGroup {
 public:
  virtual ~RankGroup() = default;
  virtual uint32_t size() const = 0;
  virtual uint32_t rank() const = 0;
  /// Bytes of HCCL's buffer (HCCL_BUFFSIZE, or what the communicator was configured with). Operators have
  /// documented needs of it; the host runtime itself has other buffers.
  virtual uint64_t buffer_bytes() const = 0;
  /// From now on only exchanges of experts' rows run in this group. Throws std::exception if something else
  /// already has.
  virtual void keep_for_experts() const = 0;
  /// Sends `parts[r]` to rank r and returns what came from each rank, as part of a task: every rank has to
  /// run it. Only the sender knows how large a part is. Throws TaskError.
  virtual Parts exchange(const ExpertExchange& what, const Parts& parts, const char* label) const = 0;
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
