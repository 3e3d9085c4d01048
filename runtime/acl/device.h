// Devices, contexts and what the calling thread uses of them.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "runtime/acl/error.h"
#include "runtime/acl/settings.h"

namespace host_runtime {

class Stream;

/// The memory of one device: counted, not reserved.
class MemoryAccount {
 public:
  explicit MemoryAccount(uint64_t total) : total_(total) {}

  /// False when `bytes` do not fit.
  bool take(uint64_t bytes);
  void give_back(uint64_t bytes) { used_.fetch_sub(bytes); }
  uint64_t used() const { return used_.load(); }
  uint64_t peak() const { return peak_.load(); }
  uint64_t total() const { return total_; }

 private:
  const uint64_t total_;
  std::atomic<uint64_t> used_{0};
  std::atomic<uint64_t> peak_{0};
};

/// The streams a device can hold; captured graphs hold streams too.
class StreamBudget {
 public:
  /// The lowest free stream number, or -1 when the budget is spent.
  int32_t take();
  void give_back(int32_t id);
  uint32_t available() const;

 private:
  mutable std::mutex mutex_;
  std::set<int32_t> returned_;
  int32_t next_ = 0;
};

struct Device {
  explicit Device(int32_t id) : id(id), memory(settings().hbm) {}

  const int32_t id;
  MemoryAccount memory;
  StreamBudget streams;
  std::atomic<int64_t> users{0};  ///< aclrtSetDevice minus aclrtResetDevice
  std::mutex limits_mutex;
  std::map<int, uint32_t> core_limits;  ///< aclrtSetDeviceResLimit: by aclrtDevResLimitType
};

/// What aclrtContext points to. Every device has a primary context, which aclrtSetDevice makes current.
struct Context {
  Context(Device& device, bool primary) : device(device), primary(primary) {}
  Device& device;
  const bool primary;

  /// Created at the first use.
  std::shared_ptr<Stream> default_stream();
  /// The default stream if there is one yet.
  std::shared_ptr<Stream> existing_default_stream();
  void drop_default_stream();

 private:
  std::mutex mutex_;
  std::shared_ptr<Stream> default_stream_;
};

/// Null when `id` names no device; the error is then set.
Device* find_device(int32_t id, const char* function);
Context& primary_context(Device& device);

/// The calling thread's context; null when none was set.
Context* current_context();
/// As current_context(), with error 107002 set when there is none.
Context* require_context(const char* function);

}  // namespace host_runtime
