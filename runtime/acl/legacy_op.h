// The descriptors of CANN's older way of calling operators by name (aclop*).
#pragma once

#include <string>
#include <vector>

#include "acl/acl.h"

struct aclDataBuffer {
  void* data;
  size_t size;
};

struct aclTensorDesc {
  aclDataType dtype;
  aclFormat format;
  aclFormat storage_format;
  std::vector<int64_t> dims;
  std::vector<int64_t> storage_dims;
  std::string name;
  aclMemType placement = ACL_MEMTYPE_DEVICE;
};

struct aclopAttr {
  std::vector<std::string> names;  // what was set, for messages
};

namespace host_runtime {

/// Error 100024 (set) when the calling thread is about to hand a legacy operator to torch_npu's queue.
aclError refuse_legacy_operator();

}  // namespace host_runtime
