#include "runtime/acl/device.h"

#include <unistd.h>

#include <cstring>

#include "runtime/acl/handles.h"
#include "runtime/acl/stream.h"

namespace host_runtime {
namespace {

// Leaked, as everything that worker threads may use until the process is gone.
std::vector<std::unique_ptr<Device>>& devices() {
  static auto* const all = [] {
    auto* list = new std::vector<std::unique_ptr<Device>>;
    for (uint32_t id = 0; id < settings().devices; ++id)
      list->push_back(std::make_unique<Device>(static_cast<int32_t>(id)));
    return list;
  }();
  return *all;
}

HandleTable<Context>& contexts() {
  static auto* const table = new HandleTable<Context>;
  return *table;
}

thread_local Context* thread_context = nullptr;

bool settings_are_valid(const char* function) {
  if (settings().error.empty()) return true;
  fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": " + settings().error);
  return false;
}

}  // namespace

bool MemoryAccount::take(uint64_t bytes) {
  uint64_t used = used_.load();
  do {
    if (bytes > total_ - used) return false;
  } while (!used_.compare_exchange_weak(used, used + bytes));
  uint64_t peak = peak_.load();
  while (peak < used + bytes && !peak_.compare_exchange_weak(peak, used + bytes)) {
  }
  return true;
}

int32_t StreamBudget::take() {
  std::lock_guard lock(mutex_);
  if (!returned_.empty()) {
    const int32_t id = *returned_.begin();
    returned_.erase(returned_.begin());
    return id;
  }
  return next_ < static_cast<int32_t>(settings().streams) ? next_++ : -1;
}

void StreamBudget::give_back(int32_t id) {
  std::lock_guard lock(mutex_);
  returned_.insert(id);
}

uint32_t StreamBudget::available() const {
  std::lock_guard lock(mutex_);
  return settings().streams - static_cast<uint32_t>(next_) + static_cast<uint32_t>(returned_.size());
}

std::shared_ptr<Stream> Context::default_stream() {
  std::lock_guard lock(mutex_);
  if (!default_stream_) default_stream_ = Stream::create(device, Stream::Kind::kDefault, 0, 0);
  return default_stream_;
}

std::shared_ptr<Stream> Context::existing_default_stream() {
  std::lock_guard lock(mutex_);
  return default_stream_;
}

void Context::drop_default_stream() {
  std::shared_ptr<Stream> dropped;
  std::lock_guard lock(mutex_);
  dropped.swap(default_stream_);
  if (!dropped) return;
  forget_stream(dropped.get());
  dropped->close();
}

Device* find_device(int32_t id, const char* function) {
  if (!settings_are_valid(function)) return nullptr;
  if (id >= 0 && static_cast<size_t>(id) < devices().size()) return devices()[static_cast<size_t>(id)].get();
  fail(ACL_ERROR_RT_INVALID_DEVICEID, std::string(function) + ": there is no device " + std::to_string(id) +
                                          ", only 0 to " + std::to_string(devices().size() - 1) +
                                          " (NPU_COMPILER_HOST=devices=N sets their number)");
  return nullptr;
}

Context& primary_context(Device& device) {
  static auto* const all = [] {
    auto* list = new std::vector<std::shared_ptr<Context>>;
    for (auto& each : devices()) {
      list->push_back(std::make_shared<Context>(*each, true));
      contexts().add(list->back());
    }
    return list;
  }();
  return *(*all)[static_cast<size_t>(device.id)];
}

Context* current_context() { return thread_context; }

Context* require_context(const char* function) {
  if (thread_context == nullptr) {
    fail(ACL_ERROR_RT_CONTEXT_NULL,
         std::string(function) + ": the calling thread has no context; call aclrtSetDevice first");
  }
  return thread_context;
}

}  // namespace host_runtime

using namespace host_runtime;

aclError aclrtGetDeviceCount(uint32_t* count) {
  if (count == nullptr) return fail_null("aclrtGetDeviceCount", "count");
  if (!settings_are_valid("aclrtGetDeviceCount")) return ACL_ERROR_INVALID_PARAM;
  *count = settings().devices;
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t deviceId) {
  Device* device = find_device(deviceId, "aclrtSetDevice");
  if (device == nullptr) return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
  device->users.fetch_add(1);
  thread_context = &primary_context(*device);
  return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t* deviceId) {
  if (deviceId == nullptr) return fail_null("aclrtGetDevice", "deviceId");
  const Context* context = require_context("aclrtGetDevice");
  if (context == nullptr) return ACL_ERROR_RT_CONTEXT_NULL;
  *deviceId = context->device.id;
  return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t deviceId) {
  Device* device = find_device(deviceId, "aclrtResetDevice");
  if (device == nullptr) return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
  if (device->users.load() > 0 && device->users.fetch_sub(1) > 1) return ACL_SUCCESS;
  return aclrtResetDeviceForce(deviceId);
}

aclError aclrtResetDeviceForce(int32_t deviceId) {
  Device* device = find_device(deviceId, "aclrtResetDeviceForce");
  if (device == nullptr) return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
  device->users.store(0);
  primary_context(*device).drop_default_stream();
  if (thread_context == &primary_context(*device)) thread_context = nullptr;
  return ACL_SUCCESS;
}

aclError aclrtCreateContext(aclrtContext* context, int32_t deviceId) {
  if (context == nullptr) return fail_null("aclrtCreateContext", "context");
  Device* device = find_device(deviceId, "aclrtCreateContext");
  if (device == nullptr) return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
  auto created = std::make_shared<Context>(*device, false);
  thread_context = created.get();
  *context = contexts().add(std::move(created));
  return ACL_SUCCESS;
}

aclError aclrtDestroyContext(aclrtContext context) {
  const auto found = contexts().find(context);
  if (!found || found->primary) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL,
                "aclrtDestroyContext: this is not a context made by aclrtCreateContext");
  }
  found->drop_default_stream();
  contexts().remove(context);
  if (thread_context == found.get()) thread_context = nullptr;
  return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  const auto found = contexts().find(context);
  if (!found) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtSetCurrentContext: this context does not exist");
  thread_context = found.get();
  return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  if (context == nullptr) return fail_null("aclrtGetCurrentContext", "context");
  Context* current = require_context("aclrtGetCurrentContext");
  if (current == nullptr) return ACL_ERROR_RT_CONTEXT_NULL;
  *context = current;
  return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t deviceId, uint32_t* flags, int32_t* active) {
  Device* device = find_device(deviceId, "aclrtGetPrimaryCtxState");
  if (device == nullptr) return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
  if (active == nullptr) return fail_null("aclrtGetPrimaryCtxState", "active");
  if (flags != nullptr) *flags = 0;
  *active = device->users.load() > 0 ? 1 : 0;
  return ACL_SUCCESS;
}

aclError aclrtCtxGetCurrentDefaultStream(aclrtStream* stream) {
  if (stream == nullptr) return fail_null("aclrtCtxGetCurrentDefaultStream", "stream");
  Context* context = require_context("aclrtCtxGetCurrentDefaultStream");
  if (context == nullptr) return ACL_ERROR_RT_CONTEXT_NULL;
  *stream = context->default_stream().get();
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  if (pid == nullptr) return fail_null("aclrtDeviceGetBareTgid", "pid");
  *pid = static_cast<int32_t>(getpid());
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetUuid(int32_t deviceId, aclrtUuid* uuid) {
  if (uuid == nullptr) return fail_null("aclrtDeviceGetUuid", "uuid");
  if (find_device(deviceId, "aclrtDeviceGetUuid") == nullptr)
    return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
  std::memset(uuid->bytes, 0, sizeof uuid->bytes);
  std::memcpy(uuid->bytes, "npu-host", 8);
  uuid->bytes[15] = static_cast<char>(deviceId);
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* canAccessPeer, int32_t deviceId, int32_t peerDeviceId) {
  if (canAccessPeer == nullptr) return fail_null("aclrtDeviceCanAccessPeer", "canAccessPeer");
  for (const int32_t id : {deviceId, peerDeviceId}) {
    if (find_device(id, "aclrtDeviceCanAccessPeer") == nullptr)
      return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
  }
  *canAccessPeer = deviceId != peerDeviceId ? 1 : 0;
  return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t peerDeviceId, uint32_t flags) {
  if (flags != 0) return fail(ACL_ERROR_INVALID_PARAM, "aclrtDeviceEnablePeerAccess: flags must be 0");
  if (find_device(peerDeviceId, "aclrtDeviceEnablePeerAccess") == nullptr) {
    return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
  }
  return ACL_SUCCESS;
}

aclError aclrtDeviceDisablePeerAccess(int32_t peerDeviceId) {
  if (find_device(peerDeviceId, "aclrtDeviceDisablePeerAccess") == nullptr) {
    return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL);
  }
  return ACL_SUCCESS;
}

aclError aclrtDevicePeerAccessStatus(int32_t deviceId, int32_t peerDeviceId, int32_t* status) {
  return aclrtDeviceCanAccessPeer(status, deviceId, peerDeviceId);
}
