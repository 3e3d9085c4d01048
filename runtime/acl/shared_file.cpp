#include "runtime/acl/shared_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace host_runtime {

DeviceFile& DeviceFile::of(const Device& device) {
  static auto* const mutex = new std::mutex;
  static auto* const files = new std::map<int32_t, DeviceFile*>;
  std::lock_guard lock(*mutex);
  DeviceFile*& file = (*files)[device.id];
  if (file == nullptr) file = new DeviceFile(device.id);
  return *file;
}

DeviceFile::DeviceFile(int32_t device_id)
    : descriptor_(memfd_create(name_of(device_id).c_str(), MFD_CLOEXEC)) {}

int64_t DeviceFile::take(size_t bytes) {
  std::lock_guard lock(mutex_);
  const auto wanted = static_cast<int64_t>(bytes);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second < wanted) continue;
    const auto [offset, available] = *it;
    free_.erase(it);
    if (available > wanted) free_[offset + wanted] = available - wanted;
    return offset;
  }
  if (ftruncate(descriptor_, end_ + wanted) != 0) return -1;
  const int64_t offset = end_;
  end_ += wanted;
  return offset;
}

void DeviceFile::give_back(int64_t offset, size_t bytes) {
  std::lock_guard lock(mutex_);
  fallocate(descriptor_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, static_cast<off_t>(bytes));
  add_free(offset, static_cast<int64_t>(bytes));
}

void DeviceFile::add_free(int64_t offset, int64_t bytes) {
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && next->first == offset + bytes) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += bytes;
      return;
    }
  }
  free_[offset] = bytes;
}

int open_memory_file(int pid, const std::string& name) {
  const std::string folder = "/proc/" + std::to_string(pid) + "/fd";
  const std::string wanted = "/memfd:" + name + " (deleted)";
  DIR* entries = opendir(folder.c_str());
  if (entries == nullptr) return -1;
  int descriptor = -1;
  while (const dirent* entry = readdir(entries)) {
    char target[64] = {};
    const std::string path = folder + "/" + entry->d_name;
    if (readlink(path.c_str(), target, sizeof target - 1) > 0 && wanted == target) {
      descriptor = open(path.c_str(), O_RDWR | O_CLOEXEC);
      break;
    }
  }
  closedir(entries);
  return descriptor;
}

}  // namespace host_runtime
