#include "runtime/acl/value.h"

#include "runtime/acl/capture.h"
#include "runtime/acl/memory.h"

namespace host_runtime {
namespace {

WaitPoint& value_written() {
  static auto* const point = new WaitPoint(Spin::kThread);
  return *point;
}

/// Why writes that others wait for were not preceded by what their stream should have done.
struct FailedWrites {
  std::atomic<size_t> number{0};
  std::mutex mutex;
  std::map<const void*, StreamFailure> by_address;
};

FailedWrites& failed_writes() {
  static auto* const all = new FailedWrites;
  return *all;
}

aclError submit_value(bool is_wait, void* address, uint64_t value, uint32_t flag, aclrtStream handle) {
  const char* const function = is_wait ? "aclrtValueWait" : "aclrtValueWrite";
  return guarded(function, [&] {
    if (address == nullptr) return fail_null(function, "devAddr");
    if (reinterpret_cast<uintptr_t>(address) % sizeof(uint64_t) != 0) {
      return fail(ACL_ERROR_RT_ADDR_UNALIGNED, std::string(function) + ": devAddr is not a multiple of 8");
    }
    const auto allocation = MemoryMap::instance().find(address);
    if (!allocation || !allocation->on_device()) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  std::string(function) + ": devAddr is not in the memory of a device");
    }
    const auto stream = find_stream(handle, function);
    if (!stream) return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
    return submit_to(*stream, std::make_shared<ValueTask>(is_wait, address, value, flag),
                     is_wait ? ACL_MODEL_RI_TASK_VALUE_WAIT : ACL_MODEL_RI_TASK_VALUE_WRITE);
  });
}

}  // namespace

bool ValueTask::holds(uint64_t present) const {
  switch (flag) {
    case ACL_STREAM_WAIT_VALUE_GEQ:
      return static_cast<int64_t>(present - value) >= 0;
    case ACL_STREAM_WAIT_VALUE_EQ:
      return present == value;
    case ACL_STREAM_WAIT_VALUE_AND:
      return (present & value) != 0;
    default:
      return ~(present | value) != 0;
  }
}

bool ValueTask::ready() const { return !is_wait || holds(__atomic_load_n(address, __ATOMIC_ACQUIRE)); }

void ValueTask::run() {
  FailedWrites& failed = failed_writes();
  if (!is_wait) {
    if (failed.number.load() != 0) {
      std::lock_guard lock(failed.mutex);
      failed.by_address.erase(address);
      failed.number.store(failed.by_address.size());
    }
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
    value_written().notify();
    return;
  }
  // A copy or an operator may write the value too, and tells nobody: look again now and then.
  while (!value_written().wait([this] { return ready(); }, Clock::now() + std::chrono::milliseconds(1))) {
  }
  if (failed.number.load() == 0) return;
  std::lock_guard lock(failed.mutex);
  const auto found = failed.by_address.find(address);
  if (found != failed.by_address.end()) {
    throw TaskError(found->second.code,
                    "the stream that should have written the value failed: " + found->second.message);
  }
}

void ValueTask::skip(const StreamFailure& failure) {
  if (is_wait) return;
  {
    FailedWrites& failed = failed_writes();
    std::lock_guard lock(failed.mutex);
    failed.by_address.insert_or_assign(address, failure);
    failed.number.store(failed.by_address.size());
  }
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
  value_written().notify();
}

std::string ValueTask::arguments_json() const {
  return "{\"address\": " + std::to_string(reinterpret_cast<uintptr_t>(address)) +
         ", \"value\": " + std::to_string(value) + "}";
}

}  // namespace host_runtime

aclError aclrtValueWrite(void* devAddr, uint64_t value, uint32_t flag, aclrtStream stream) {
  if (flag != 0) return host_runtime::fail(ACL_ERROR_INVALID_PARAM, "aclrtValueWrite: flag must be 0");
  return host_runtime::submit_value(false, devAddr, value, 0, stream);
}

aclError aclrtValueWait(void* devAddr, uint64_t value, uint32_t flag, aclrtStream stream) {
  if (flag > ACL_STREAM_WAIT_VALUE_NOR)
    return host_runtime::fail(ACL_ERROR_INVALID_PARAM, "aclrtValueWait: unknown flag");
  return host_runtime::submit_value(true, devAddr, value, flag, stream);
}
