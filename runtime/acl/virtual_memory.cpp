// Addresses and memory apart: reserve addresses, allocate memory, map one to the other, share memory between
// processes.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "runtime/acl/handles.h"
#include "runtime/acl/memory.h"
#include "runtime/acl/shared_file.h"

namespace host_runtime {
namespace {

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

/// What aclrtDrvMemHandle points to: a range of a device's file, of this process or another.
struct PhysicalMemory {
  PhysicalMemory(Device& device, int descriptor, int64_t offset, size_t bytes, bool imported)
      : device(device), descriptor(descriptor), offset(offset), bytes(bytes), imported(imported) {}
  ~PhysicalMemory() {
    if (imported) {
      close(descriptor);
    } else {
      DeviceFile::of(device).give_back(offset, bytes);
      device.memory.give_back(bytes);
    }
  }
  PhysicalMemory(const PhysicalMemory&) = delete;
  PhysicalMemory& operator=(const PhysicalMemory&) = delete;

  Device& device;
  const int descriptor;
  const int64_t offset;
  const size_t bytes;
  const bool imported;
};

HandleTable<PhysicalMemory>& physical_memory() {
  static auto* const table = new HandleTable<PhysicalMemory>;
  return *table;
}

std::shared_ptr<PhysicalMemory> find_physical(aclrtDrvMemHandle handle, const char* function) {
  auto memory = physical_memory().find(handle);
  if (!memory) {
    fail(ACL_ERROR_RT_INVALID_HANDLE,
         std::string(function) + ": the handle names no physical memory (freed before?)");
  }
  return memory;
}

/// Memory stays alive while it is mapped, even when its handle was freed.
struct Mappings {
  std::mutex mutex;
  std::map<uintptr_t, std::shared_ptr<PhysicalMemory>> by_address;
};

Mappings& mappings() {
  static auto* const all = new Mappings;
  return *all;
}

// A shareable handle is 64 bits, and all that the importer has: the process, the device, and the range in
// units of 2 MiB.
struct SharedRange {
  uint64_t pid : 22;
  uint64_t device : 6;
  uint64_t offset : 20;
  uint64_t size : 16;
};
static_assert(sizeof(SharedRange) == sizeof(uint64_t));

aclError export_memory(aclrtDrvMemHandle handle, void* shareable, const char* function) {
  if (shareable == nullptr) return fail_null(function, "shareableHandle");
  const auto memory = find_physical(handle, function);
  if (!memory) return last_error();
  if (memory->imported) {
    return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                std::string(function) + ": memory of another process is shared by that process");
  }
  SharedRange range{};
  range.pid = static_cast<uint64_t>(getpid());
  range.device = static_cast<uint64_t>(memory->device.id);
  range.offset = static_cast<uint64_t>(memory->offset) / DeviceFile::kGranularity;
  range.size = memory->bytes / DeviceFile::kGranularity;
  std::memcpy(shareable, &range, sizeof range);
  return ACL_SUCCESS;
}

aclError import_memory(const void* shareable, int32_t device_id, aclrtDrvMemHandle* handle,
                       const char* function) {
  return guarded(function, [&] {
    if (shareable == nullptr) return fail_null(function, "shareableHandle");
    if (handle == nullptr) return fail_null(function, "handle");
    Device* device = find_device(device_id, function);
    if (device == nullptr) return last_error();
    SharedRange range{};
    std::memcpy(&range, shareable, sizeof range);
    const int descriptor = open_memory_file(static_cast<int>(range.pid),
                                            DeviceFile::name_of(static_cast<int32_t>(range.device)));
    if (descriptor < 0) {
      return fail(ACL_ERROR_RT_IPC_ERROR, std::string(function) + ": the memory of process " +
                                              std::to_string(range.pid) +
                                              " cannot be opened; it has ended, or belongs to another user");
    }
    *handle = physical_memory().add(
        std::make_shared<PhysicalMemory>(*device, descriptor, range.offset * DeviceFile::kGranularity,
                                         range.size * DeviceFile::kGranularity, true));
    return ACL_SUCCESS;
  });
}

aclError reserve(void** pointer, size_t size, size_t alignment, const char* function) {
  return guarded(function, [&] {
    if (pointer == nullptr) return fail_null(function, "virPtr");
    if (size == 0) return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": size is 0");
    if (alignment != 0 && (alignment & (alignment - 1)) != 0) {
      return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": alignment is not a power of two");
    }
    // Addresses come aligned to the granularity: take more, give the ends back.
    const size_t bytes = round_up(size, page_size());
    auto* raw = static_cast<char*>(mmap(nullptr, bytes + DeviceFile::kGranularity, PROT_NONE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (raw == MAP_FAILED) {
      return fail(ACL_ERROR_BAD_ALLOC, std::string(function) + ": the host has no address space for " +
                                           std::to_string(size) + " bytes");
    }
    auto* aligned =
        reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(raw), DeviceFile::kGranularity));
    if (aligned != raw) munmap(raw, static_cast<size_t>(aligned - raw));
    const auto tail = static_cast<size_t>(raw + bytes + DeviceFile::kGranularity - (aligned + bytes));
    if (tail != 0) munmap(aligned + bytes, tail);
    MemoryMap::instance().add(
        {reinterpret_cast<uintptr_t>(aligned), bytes, 0, Allocation::Kind::kReserved, nullptr});
    *pointer = aligned;
    return ACL_SUCCESS;
  });
}

}  // namespace
}  // namespace host_runtime

using namespace host_runtime;

aclError aclrtReserveMemAddress(void** virPtr, size_t size, size_t alignment, void*, uint64_t) {
  return reserve(virPtr, size, alignment, "aclrtReserveMemAddress");
}

aclError aclrtReserveMemAddressNoUCMemory(void** virPtr, size_t size, size_t alignment, void*, uint64_t) {
  return reserve(virPtr, size, alignment, "aclrtReserveMemAddressNoUCMemory");
}

aclError aclrtReleaseMemAddress(void* virPtr) {
  const auto reservation = MemoryMap::instance().remove(virPtr, {Allocation::Kind::kReserved});
  if (!reservation)
    return fail(ACL_ERROR_INVALID_PARAM, "aclrtReleaseMemAddress: this address was not reserved");
  munmap(virPtr, reservation->bytes);
  return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t size, const aclrtPhysicalMemProp* prop,
                             uint64_t) {
  return guarded("aclrtMallocPhysical", [&] {
    const char* const function = "aclrtMallocPhysical";
    if (handle == nullptr) return fail_null(function, "handle");
    if (prop == nullptr) return fail_null(function, "prop");
    if (size == 0 || size % DeviceFile::kGranularity != 0) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  std::string(function) + ": size " + std::to_string(size) +
                      " is not a multiple of 2 MiB (aclrtMemGetAllocationGranularity)");
    }
    Device* device = find_device(static_cast<int32_t>(prop->location.id), function);
    if (device == nullptr) return last_error();
    if (!device->memory.take(size)) return fail_out_of_memory(*device, size, function);
    DeviceFile& file = DeviceFile::of(*device);
    const int64_t offset = file.descriptor() < 0 ? -1 : file.take(size);
    if (offset < 0) {
      device->memory.give_back(size);
      return fail(ACL_ERROR_BAD_ALLOC,
                  std::string(function) + ": the host cannot provide the memory: " + std::strerror(errno));
    }
    *handle = physical_memory().add(
        std::make_shared<PhysicalMemory>(*device, file.descriptor(), offset, size, false));
    return ACL_SUCCESS;
  });
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  if (physical_memory().remove(handle)) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_INVALID_HANDLE,
              "aclrtFreePhysical: the handle names no physical memory (freed before?)");
}

aclError aclrtMapMem(void* virPtr, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
  return guarded("aclrtMapMem", [&] {
    const char* const function = "aclrtMapMem";
    const auto memory = find_physical(handle, function);
    if (!memory) return last_error();
    const auto address = reinterpret_cast<uintptr_t>(virPtr);
    const auto reservation = MemoryMap::instance().find(virPtr);
    if (!reservation || reservation->kind != Allocation::Kind::kReserved ||
        !reservation->contains(address, size)) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  std::string(function) + ": the addresses are not reserved, or already mapped");
    }
    if (offset + size > memory->bytes || offset % page_size() != 0) {
      return fail(ACL_ERROR_INVALID_PARAM, std::string(function) +
                                               ": offset and size are not within the memory's " +
                                               std::to_string(memory->bytes) + " bytes");
    }
    void* mapped = mmap(virPtr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                        memory->descriptor, memory->offset + static_cast<off_t>(offset));
    if (mapped == MAP_FAILED) {
      return fail(ACL_ERROR_BAD_ALLOC, std::string(function) + ": the host refuses: " + std::strerror(errno));
    }
    MemoryMap::instance().add({address, size, 0, Allocation::Kind::kMapped, &memory->device});
    std::lock_guard lock(mappings().mutex);
    mappings().by_address[address] = memory;
    return ACL_SUCCESS;
  });
}

aclError aclrtUnmapMem(void* virPtr) {
  return guarded("aclrtUnmapMem", [&] {
    const auto mapping = MemoryMap::instance().remove(virPtr, {Allocation::Kind::kMapped});
    if (!mapping) return fail(ACL_ERROR_INVALID_PARAM, "aclrtUnmapMem: no mapping begins at this address");
    mmap(virPtr, mapping->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    std::lock_guard lock(mappings().mutex);
    mappings().by_address.erase(mapping->base);
    return ACL_SUCCESS;
  });
}

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp* prop, aclrtMemGranularityOptions,
                                          size_t* granularity) {
  if (prop == nullptr) return fail_null("aclrtMemGetAllocationGranularity", "prop");
  if (granularity == nullptr) return fail_null("aclrtMemGetAllocationGranularity", "granularity");
  *granularity = DeviceFile::kGranularity;
  return ACL_SUCCESS;
}

aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle handle, aclrtMemHandleType, uint64_t,
                                         uint64_t* shareableHandle) {
  return export_memory(handle, shareableHandle, "aclrtMemExportToShareableHandle");
}

aclError aclrtMemExportToShareableHandleV2(aclrtDrvMemHandle handle, uint64_t, aclrtMemSharedHandleType,
                                           void* shareableHandle) {
  return export_memory(handle, shareableHandle, "aclrtMemExportToShareableHandleV2");
}

aclError aclrtMemImportFromShareableHandle(uint64_t shareableHandle, int32_t deviceId,
                                           aclrtDrvMemHandle* handle) {
  return import_memory(&shareableHandle, deviceId, handle, "aclrtMemImportFromShareableHandle");
}

aclError aclrtMemImportFromShareableHandleV2(void* shareableHandle, aclrtMemSharedHandleType, uint64_t,
                                             aclrtDrvMemHandle* handle) {
  const Context* context = require_context("aclrtMemImportFromShareableHandleV2");
  if (context == nullptr) return last_error();
  return import_memory(shareableHandle, context->device.id, handle, "aclrtMemImportFromShareableHandleV2");
}

// Which processes may import is left to the operating system: those of the same user.
aclError aclrtMemSetPidToShareableHandle(uint64_t, int32_t* pid, size_t pidNum) {
  return pid == nullptr && pidNum != 0 ? fail_null("aclrtMemSetPidToShareableHandle", "pid") : ACL_SUCCESS;
}

aclError aclrtMemSetPidToShareableHandleV2(void*, aclrtMemSharedHandleType, int32_t* pid, size_t pidNum) {
  return pid == nullptr && pidNum != 0 ? fail_null("aclrtMemSetPidToShareableHandleV2", "pid") : ACL_SUCCESS;
}

aclError aclrtMemSetAccess(void* virPtr, size_t, aclrtMemAccessDesc* desc, size_t) {
  if (virPtr == nullptr) return fail_null("aclrtMemSetAccess", "virPtr");
  return desc == nullptr ? fail_null("aclrtMemSetAccess", "desc") : ACL_SUCCESS;
}
