// Memory and events that processes share.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <new>

#include "runtime/acl/capture.h"
#include "runtime/acl/event.h"
#include "runtime/acl/memory.h"
#include "runtime/acl/shared_file.h"

namespace host_runtime {
namespace {

constexpr size_t kKeyBytes = 65;  // of aclrtIpcMemGetExportKey, the terminating zero included
constexpr const char* kKeyFormat = "npu-host:%d:%d:%lld:%llu";
constexpr const char* kEventFile = "npu-events";
constexpr size_t kEventSlots = 65536;

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

/// Copies the pages of `from` that were ever touched; the others are zeros in both places.
void copy_resident(char* to, const char* from, size_t bytes) {
  constexpr size_t kChunk = size_t{64} << 20;
  std::vector<unsigned char> resident(kChunk / page_size());
  for (size_t begin = 0; begin < bytes; begin += kChunk) {
    const size_t size = std::min(kChunk, bytes - begin);
    if (mincore(const_cast<char*>(from) + begin, size, resident.data()) != 0) {
      std::memcpy(to + begin, from + begin, size);
      continue;
    }
    for (size_t page = 0; page * page_size() < size; ++page) {
      const size_t offset = begin + page * page_size();
      if ((resident[page] & 1U) != 0)
        std::memcpy(to + offset, from + offset, std::min(page_size(), bytes - offset));
    }
  }
}

/// Moves an allocation into its device's file, at the same addresses.
aclError make_shareable(Allocation& allocation, const char* function) {
  for (const auto& stream : streams_of(*allocation.device)) {
    if (const aclError error = refuse_capturing(*stream, function)) return error;
    if (const aclError error = stream->synchronize(std::nullopt, function)) return error;
  }
  DeviceFile& file = DeviceFile::of(*allocation.device);
  const size_t bytes = round_up(allocation.charged, DeviceFile::kGranularity);
  const int64_t offset = file.take(bytes);
  auto* base = reinterpret_cast<char*>(allocation.base);
  const size_t mapped = round_up(allocation.charged, page_size());
  void* copy = offset < 0 ? MAP_FAILED
                          : mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                                 file.descriptor(), offset);
  if (copy == MAP_FAILED) {
    return fail(ACL_ERROR_BAD_ALLOC,
                std::string(function) + ": the host cannot share the memory: " + std::strerror(errno));
  }
  copy_resident(static_cast<char*>(copy), base, mapped);
  munmap(copy, mapped);
  if (mmap(base, mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file.descriptor(),
           offset) == MAP_FAILED) {
    return fail(ACL_ERROR_BAD_ALLOC,
                std::string(function) + ": the host cannot map the memory: " + std::strerror(errno));
  }
  allocation.kind = Allocation::Kind::kShared;
  allocation.file_offset = offset;
  MemoryMap::instance().add(allocation);
  return ACL_SUCCESS;
}

struct Imports {
  std::mutex mutex;
  std::map<std::string, void*> by_key;
};

Imports& imports() {
  static auto* const all = new Imports;
  return *all;
}

aclError import_by_key(void** pointer, const char* key, const char* function) {
  if (pointer == nullptr) return fail_null(function, "devPtr");
  if (key == nullptr) return fail_null(function, "key");
  Context* context = require_context(function);
  if (context == nullptr) return last_error();
  int pid = 0;
  int device = 0;
  long long offset = 0;
  unsigned long long bytes = 0;
  if (std::sscanf(key, kKeyFormat, &pid, &device, &offset, &bytes) != 4) {
    return fail(ACL_ERROR_INVALID_PARAM,
                std::string(function) + ": this key was not made by aclrtIpcMemGetExportKey");
  }
  std::lock_guard lock(imports().mutex);
  if (imports().by_key.count(key) != 0) {
    return fail(ACL_ERROR_RT_IPC_ERROR,
                std::string(function) + ": this key is imported already; close it first");
  }
  const int descriptor = open_memory_file(pid, DeviceFile::name_of(device));
  void* memory = descriptor < 0 ? MAP_FAILED
                                : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                                       descriptor, offset);
  if (descriptor >= 0) close(descriptor);
  if (memory == MAP_FAILED) {
    return fail(ACL_ERROR_RT_IPC_ERROR, std::string(function) + ": the memory of process " +
                                            std::to_string(pid) +
                                            " cannot be mapped; it has ended, or belongs to another user");
  }
  MemoryMap::instance().add(
      {reinterpret_cast<uintptr_t>(memory), bytes, bytes, Allocation::Kind::kImported, &context->device});
  imports().by_key[key] = memory;
  *pointer = memory;
  return ACL_SUCCESS;
}

/// The states of this process's events, in a file that other processes can map.
class EventFile {
 public:
  static EventFile& instance() {
    static auto* const file = new EventFile;
    return *file;
  }

  /// Null when the host gives no memory, or every slot is taken.
  std::shared_ptr<EventState> take(uint32_t* slot) {
    std::lock_guard lock(mutex_);
    if (slots_ == nullptr || free_.empty()) return nullptr;
    *slot = free_.front();
    free_.pop_front();
    auto* state = new (slots_ + *slot) EventState;
    return std::shared_ptr<EventState>(state, [this, number = *slot](EventState*) {
      std::lock_guard lock(mutex_);
      free_.push_back(number);
    });
  }

  bool slot_of(const EventState* state, uint32_t* slot) const {
    if (slots_ == nullptr || state < slots_ || state >= slots_ + kEventSlots) return false;
    *slot = static_cast<uint32_t>(state - slots_);
    return true;
  }

  static EventState* map(int descriptor) {
    void* memory =
        mmap(nullptr, kEventSlots * sizeof(EventState), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<EventState*>(memory);
  }

 private:
  EventFile() {
    const int descriptor = memfd_create(kEventFile, MFD_CLOEXEC);
    if (descriptor < 0 || ftruncate(descriptor, kEventSlots * sizeof(EventState)) != 0) return;
    slots_ = map(descriptor);
    for (uint32_t i = 0; i < kEventSlots; ++i) free_.push_back(i);
  }

  std::mutex mutex_;
  EventState* slots_ = nullptr;
  std::deque<uint32_t> free_;  // used in turn, so that a freed slot is not soon another event's
};

struct EventHandle {
  char magic[8];
  int32_t pid;
  uint32_t slot;
};
static_assert(sizeof(EventHandle) <= ACL_IPC_EVENT_HANDLE_SIZE);
constexpr char kEventMagic[8] = {'n', 'p', 'u', '-', 'e', 'v', 'n', 't'};

}  // namespace

aclError create_ipc_event(aclrtEvent* event, uint32_t flags) {
  uint32_t slot = 0;
  auto state = EventFile::instance().take(&slot);
  if (!state) return fail(ACL_ERROR_RT_NO_EVENT_RESOURCE, "no event that processes can share is left");
  *event = register_event(std::make_shared<Event>(flags, Event::Kind::kCounting, std::move(state), true));
  return ACL_SUCCESS;
}

}  // namespace host_runtime

using namespace host_runtime;

aclError aclrtIpcMemGetExportKey(void* devPtr, size_t size, char* key, size_t len, uint64_t) {
  return guarded("aclrtIpcMemGetExportKey", [&] {
    const char* const function = "aclrtIpcMemGetExportKey";
    if (key == nullptr) return fail_null(function, "key");
    if (len < kKeyBytes)
      return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": len must be at least 65");
    auto allocation = MemoryMap::instance().find(devPtr);
    if (!allocation || allocation->base != reinterpret_cast<uintptr_t>(devPtr) || size > allocation->bytes ||
        (allocation->kind != Allocation::Kind::kDevice && allocation->kind != Allocation::Kind::kShared)) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  std::string(function) +
                      ": devPtr must be what aclrtMalloc returned, of 4 KiB or more, and size within it");
    }
    if (allocation->kind == Allocation::Kind::kDevice) {
      if (const aclError error = make_shareable(*allocation, function)) return error;
    }
    std::memset(key, 0, len);
    std::snprintf(key, len, kKeyFormat, static_cast<int>(getpid()), allocation->device->id,
                  static_cast<long long>(allocation->file_offset),
                  static_cast<unsigned long long>(allocation->bytes));
    return ACL_SUCCESS;
  });
}

aclError aclrtIpcMemImportByKey(void** devPtr, const char* key, uint64_t) {
  return guarded("aclrtIpcMemImportByKey",
                 [&] { return import_by_key(devPtr, key, "aclrtIpcMemImportByKey"); });
}

aclError aclrtIpcMemClose(const char* key) {
  return guarded("aclrtIpcMemClose", [&] {
    if (key == nullptr) return fail_null("aclrtIpcMemClose", "key");
    std::lock_guard lock(imports().mutex);
    const auto found = imports().by_key.find(key);
    if (found == imports().by_key.end())
      return ACL_SUCCESS;  // the process that exported it: aclrtFree ends the sharing
    const auto allocation = MemoryMap::instance().remove(found->second, {Allocation::Kind::kImported});
    if (allocation) munmap(found->second, allocation->bytes);
    imports().by_key.erase(found);
    return ACL_SUCCESS;
  });
}

// Which processes may import is left to the operating system: those of the same user.
aclError aclrtIpcMemSetImportPid(const char* key, int32_t* pid, size_t num) {
  if (key == nullptr) return fail_null("aclrtIpcMemSetImportPid", "key");
  return pid == nullptr && num != 0 ? fail_null("aclrtIpcMemSetImportPid", "pid") : ACL_SUCCESS;
}

aclError aclrtIpcGetEventHandle(aclrtEvent handle, aclrtIpcEventHandle* shared) {
  return guarded("aclrtIpcGetEventHandle", [&] {
    if (shared == nullptr) return fail_null("aclrtIpcGetEventHandle", "handle");
    const auto event = find_event(handle, "aclrtIpcGetEventHandle");
    if (!event) return last_error();
    EventHandle content{};
    if (!EventFile::instance().slot_of(event->state.get(), &content.slot)) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  "aclrtIpcGetEventHandle: the event was not created with ACL_EVENT_IPC");
    }
    std::memcpy(content.magic, kEventMagic, sizeof content.magic);
    content.pid = static_cast<int32_t>(getpid());
    std::memset(shared, 0, sizeof *shared);
    std::memcpy(shared->reserved, &content, sizeof content);
    return ACL_SUCCESS;
  });
}

aclError aclrtIpcOpenEventHandle(aclrtIpcEventHandle shared, aclrtEvent* event) {
  return guarded("aclrtIpcOpenEventHandle", [&] {
    const char* const function = "aclrtIpcOpenEventHandle";
    if (event == nullptr) return fail_null(function, "event");
    EventHandle content{};
    std::memcpy(&content, shared.reserved, sizeof content);
    if (std::memcmp(content.magic, kEventMagic, sizeof content.magic) != 0 || content.slot >= kEventSlots) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  std::string(function) + ": this handle was not made by aclrtIpcGetEventHandle");
    }
    const int descriptor = open_memory_file(content.pid, kEventFile);
    EventState* slots = descriptor < 0 ? nullptr : EventFile::map(descriptor);
    if (descriptor >= 0) close(descriptor);
    if (slots == nullptr) {
      return fail(ACL_ERROR_RT_IPC_ERROR, std::string(function) + ": the events of process " +
                                              std::to_string(content.pid) +
                                              " cannot be opened; it has ended, or belongs to another user");
    }
    std::shared_ptr<EventState> state(
        slots + content.slot, [slots](EventState*) { munmap(slots, kEventSlots * sizeof(EventState)); });
    *event = register_event(
        std::make_shared<Event>(ACL_EVENT_IPC, Event::Kind::kCounting, std::move(state), true));
    return ACL_SUCCESS;
  });
}
