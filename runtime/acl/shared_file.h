// Device memory that other processes can map.
//
// Such memory of a device lies in one file per device (memfd_create), at offsets. Another process opens the
// file through /proc/<pid>/fd, so sharing needs no files on disk and leaves nothing behind when a process
// dies.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "runtime/acl/device.h"

namespace host_runtime {

/// A device's file, and which ranges of it are free.
class DeviceFile {
 public:
  static constexpr size_t kGranularity = size_t{2} << 20;

  static DeviceFile& of(const Device& device);
  static std::string name_of(int32_t device_id) { return "npu-hbm-" + std::to_string(device_id); }

  int descriptor() const { return descriptor_; }
  /// Offset of `bytes` free bytes of zeros; -1 when the file cannot grow.
  int64_t take(size_t bytes);
  void give_back(int64_t offset, size_t bytes);

 private:
  explicit DeviceFile(int32_t device_id);
  void add_free(int64_t offset, int64_t bytes);

  int descriptor_;
  std::mutex mutex_;
  int64_t end_ = 0;
  std::map<int64_t, int64_t> free_;  // offset -> bytes
};

/// Opens a memory file (memfd_create) of a process by its name; -1 when the process or the file is not there,
/// or belongs to another user.
int open_memory_file(int pid, const std::string& name);

}  // namespace host_runtime
