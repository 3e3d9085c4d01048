#include "runtime/acl/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "runtime/acl/check.h"
#include "runtime/acl/counters.h"
#include "runtime/acl/shared_file.h"
#include "runtime/acl/stream.h"

namespace host_runtime {
namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kZeroByDropping = size_t{2} << 20;

std::string mebibytes(uint64_t bytes) {
  char text[48];
  std::snprintf(text, sizeof text, "%.2f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

/// What CANN's page sizes make of a request: 2 MiB pages from 1 MiB on, unless normal pages are asked for.
size_t charged_bytes(size_t bytes, aclrtMemMallocPolicy policy) {
  const bool normal = policy == ACL_MEM_MALLOC_NORMAL_ONLY || policy == ACL_MEM_MALLOC_NORMAL_ONLY_P2P;
  return round_up(bytes, !normal && bytes > (size_t{1} << 20) ? kHugePage : kAlignment);
}

/// Zero pages of 2 MiB, as far as Linux has some when they are touched; null when the host has no address
/// space left. `bytes` is a multiple of kHugePage. Kernels that read tens of MiB a step wait for fewer
/// page walks.
void* map_huge_pages(size_t bytes) {
  // Only what is aligned becomes a huge page.
  auto* raw = static_cast<char*>(map_pages(bytes + kHugePage));
  if (raw == nullptr) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(raw);
  const size_t before = round_up(address, kHugePage) - address;
  if (before > 0) munmap(raw, before);
  munmap(raw + before + bytes, kHugePage - before);
  madvise(raw + before, bytes, MADV_HUGEPAGE);  // a wish: without it the pages are small ones
  return raw + before;
}

aclError allocate(void** pointer, size_t bytes, aclrtMemMallocPolicy policy, const char* function) {
  return guarded(function, [&] {
    if (pointer == nullptr) return fail_null(function, "devPtr");
    if (bytes == 0) return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": size is 0");
    Context* context = require_context(function);
    if (context == nullptr) return last_error();
    Device& device = context->device;
    const size_t charged = charged_bytes(bytes, policy);
    if (charged < bytes || !device.memory.take(charged)) return fail_out_of_memory(device, bytes, function);
    const bool small = bytes < page_size();
    void* memory = small                      ? std::aligned_alloc(kAlignment, charged)
                   : charged % kHugePage == 0 ? map_huge_pages(charged)
                                              : map_pages(charged);
    if (memory == nullptr) {
      device.memory.give_back(charged);
      return fail(ACL_ERROR_BAD_ALLOC,
                  std::string(function) + ": the host has no address space for " + mebibytes(bytes));
    }
    if (small) std::memset(memory, 0, charged);
    MemoryMap::instance().add({reinterpret_cast<uintptr_t>(memory), bytes, charged,
                               small ? Allocation::Kind::kSmall : Allocation::Kind::kDevice, &device});
    check::allocated(memory, bytes);
    *pointer = memory;
    return ACL_SUCCESS;
  });
}

aclError release(void* pointer, const char* function) {
  return guarded(function, [&] {
    if (pointer == nullptr) return fail_null(function, "devPtr");
    using Kind = Allocation::Kind;
    const auto allocation =
        MemoryMap::instance().remove(pointer, {Kind::kDevice, Kind::kSmall, Kind::kShared});
    if (!allocation) {
      return fail(
          ACL_ERROR_INVALID_PARAM,
          std::string(function) + ": this address was not allocated by aclrtMalloc, or was freed before");
    }
    allocation->device->memory.give_back(allocation->charged);
    if (check::freed(*allocation)) return ACL_SUCCESS;
    release_pages(*allocation);
    return ACL_SUCCESS;
  });
}

aclError allocate_host(void** pointer, size_t bytes, const char* function) {
  return guarded(function, [&] {
    if (pointer == nullptr) return fail_null(function, "hostPtr");
    if (bytes == 0) return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": size is 0");
    void* memory = map_pages(round_up(bytes, page_size()));
    if (memory == nullptr) {
      return fail(ACL_ERROR_BAD_ALLOC,
                  std::string(function) + ": the host has no memory for " + mebibytes(bytes));
    }
    MemoryMap::instance().add(
        {reinterpret_cast<uintptr_t>(memory), bytes, 0, Allocation::Kind::kPinned, nullptr});
    *pointer = memory;
    return ACL_SUCCESS;
  });
}

aclError release_host(void* pointer, const char* function) {
  return guarded(function, [&] {
    if (pointer == nullptr) return fail_null(function, "hostPtr");
    const auto allocation = MemoryMap::instance().remove(pointer, {Allocation::Kind::kPinned});
    if (!allocation) {
      return fail(
          ACL_ERROR_INVALID_PARAM,
          std::string(function) + ": this address was not allocated by aclrtMallocHost, or was freed before");
    }
    munmap(pointer, round_up(allocation->bytes, page_size()));
    return ACL_SUCCESS;
  });
}

aclError register_host(void* pointer, uint64_t bytes, const char* function) {
  if (pointer == nullptr) return fail_null(function, "ptr");
  if (bytes == 0) return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": size is 0");
  if (const auto known = MemoryMap::instance().find(pointer)) {
    return fail(ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
                std::string(function) + ": the address is already known to the runtime");
  }
  MemoryMap::instance().add(
      {reinterpret_cast<uintptr_t>(pointer), bytes, 0, Allocation::Kind::kRegistered, nullptr});
  return ACL_SUCCESS;
}

}  // namespace

size_t page_size() {
  static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

void* map_pages(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

void release_pages(const Allocation& allocation) {
  auto* memory = reinterpret_cast<void*>(allocation.base);
  if (allocation.kind == Allocation::Kind::kSmall) {
    std::free(memory);
  } else {
    munmap(memory, round_up(allocation.charged, page_size()));
  }
  if (allocation.kind == Allocation::Kind::kShared) {
    DeviceFile::of(*allocation.device)
        .give_back(allocation.file_offset, round_up(allocation.charged, DeviceFile::kGranularity));
  }
}

aclError fail_out_of_memory(const Device& device, size_t wanted, const char* function) {
  const uint64_t total = device.memory.total();
  return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
              std::string(function) + ": device " + std::to_string(device.id) + " is out of memory: wanted " +
                  mebibytes(wanted) + ", free " + mebibytes(total - device.memory.used()) + " of " +
                  mebibytes(total) + " (NPU_COMPILER_HOST=hbm=SIZE sets the size of a device's memory)");
}

MemoryMap& MemoryMap::instance() {
  static auto* const map = new MemoryMap;
  return *map;
}

void MemoryMap::add(const Allocation& allocation) {
  std::unique_lock lock(mutex_);
  auto& map = allocation.kind == Allocation::Kind::kReserved ? reservations_ : allocations_;
  map[allocation.base] = allocation;
}

std::optional<Allocation> MemoryMap::remove(const void* base, std::initializer_list<Allocation::Kind> kinds) {
  std::unique_lock lock(mutex_);
  for (auto* map : {&allocations_, &reservations_}) {
    const auto found = map->find(reinterpret_cast<uintptr_t>(base));
    if (found == map->end()) continue;
    for (const auto kind : kinds) {
      if (found->second.kind != kind) continue;
      const Allocation allocation = found->second;
      map->erase(found);
      return allocation;
    }
  }
  return std::nullopt;
}

std::optional<Allocation> MemoryMap::find(const void* pointer) const {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  std::shared_lock lock(mutex_);
  for (const auto* map : {&allocations_, &reservations_}) {
    auto after = map->upper_bound(address);
    if (after == map->begin()) continue;
    const Allocation& candidate = std::prev(after)->second;
    if (candidate.contains(address, 1)) return candidate;
  }
  return std::nullopt;
}

void zero_fill(void* pointer, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t first = round_up(address, page_size());
  const uintptr_t last = (address + bytes) / page_size() * page_size();
  const auto allocation = bytes >= kZeroByDropping ? MemoryMap::instance().find(pointer) : std::nullopt;
  int advice = -1;
  if (allocation && last > first && allocation->contains(address, bytes)) {
    if (allocation->kind == Allocation::Kind::kDevice) advice = MADV_DONTNEED;
    if (allocation->kind == Allocation::Kind::kMapped || allocation->kind == Allocation::Kind::kShared)
      advice = MADV_REMOVE;
  }
  if (advice < 0 || madvise(reinterpret_cast<void*>(first), last - first, advice) != 0) {
    std::memset(pointer, 0, bytes);
    return;
  }
  std::memset(pointer, 0, first - address);
  std::memset(reinterpret_cast<void*>(last), 0, address + bytes - last);
}

}  // namespace host_runtime

using namespace host_runtime;

aclError aclrtMalloc(void** devPtr, size_t size, aclrtMemMallocPolicy policy) {
  return allocate(devPtr, size, policy, "aclrtMalloc");
}

aclError aclrtMallocAlign32(void** devPtr, size_t size, aclrtMemMallocPolicy policy) {
  return allocate(devPtr, size, policy, "aclrtMallocAlign32");
}

aclError aclrtMallocCached(void** devPtr, size_t size, aclrtMemMallocPolicy policy) {
  return allocate(devPtr, size, policy, "aclrtMallocCached");
}

aclError aclrtMallocWithCfg(void** devPtr, size_t size, aclrtMemMallocPolicy policy, aclrtMallocConfig*) {
  return allocate(devPtr, size, policy, "aclrtMallocWithCfg");
}

aclError aclrtFree(void* devPtr) { return release(devPtr, "aclrtFree"); }

aclError aclrtFreeWithDevSync(void* devPtr) {
  if (const aclError error = aclrtSynchronizeDevice()) return error;
  return release(devPtr, "aclrtFreeWithDevSync");
}

aclError aclrtMemFlush(void* devPtr, size_t) {
  return devPtr == nullptr ? fail_null("aclrtMemFlush", "devPtr") : ACL_SUCCESS;
}

aclError aclrtMemInvalidate(void* devPtr, size_t) {
  return devPtr == nullptr ? fail_null("aclrtMemInvalidate", "devPtr") : ACL_SUCCESS;
}

aclError aclrtMallocHost(void** hostPtr, size_t size) {
  return allocate_host(hostPtr, size, "aclrtMallocHost");
}

aclError aclrtMallocHostWithCfg(void** ptr, uint64_t size, aclrtMallocConfig*) {
  return allocate_host(ptr, size, "aclrtMallocHostWithCfg");
}

aclError aclrtFreeHost(void* hostPtr) { return release_host(hostPtr, "aclrtFreeHost"); }

aclError aclrtFreeHostWithDevSync(void* hostPtr) {
  if (const aclError error = aclrtSynchronizeDevice()) return error;
  return release_host(hostPtr, "aclrtFreeHostWithDevSync");
}

aclError aclrtHostRegister(void* ptr, uint64_t size, aclrtHostRegisterType, void** devPtr) {
  return guarded("aclrtHostRegister", [&] {
    if (devPtr == nullptr) return fail_null("aclrtHostRegister", "devPtr");
    if (const aclError error = register_host(ptr, size, "aclrtHostRegister")) return error;
    *devPtr = ptr;
    return ACL_SUCCESS;
  });
}

aclError aclrtHostRegisterV2(void* ptr, uint64_t size, uint32_t) {
  return guarded("aclrtHostRegisterV2", [&] { return register_host(ptr, size, "aclrtHostRegisterV2"); });
}

aclError aclrtHostGetDevicePointer(void* pHost, void** pDevice, uint32_t) {
  if (pDevice == nullptr) return fail_null("aclrtHostGetDevicePointer", "pDevice");
  const auto allocation = MemoryMap::instance().find(pHost);
  if (!allocation || allocation->on_device()) {
    return fail(ACL_ERROR_HOST_MEMORY_NOT_REGISTERED,
                "aclrtHostGetDevicePointer: this memory is not registered");
  }
  *pDevice = pHost;
  return ACL_SUCCESS;
}

aclError aclrtHostUnregister(void* ptr) {
  if (MemoryMap::instance().remove(ptr, {Allocation::Kind::kRegistered})) return ACL_SUCCESS;
  return fail(ACL_ERROR_HOST_MEMORY_NOT_REGISTERED, "aclrtHostUnregister: this memory is not registered");
}

aclError aclrtPointerGetAttributes(const void* ptr, aclrtPtrAttributes* attributes) {
  if (ptr == nullptr) return fail_null("aclrtPointerGetAttributes", "ptr");
  if (attributes == nullptr) return fail_null("aclrtPointerGetAttributes", "attributes");
  *attributes = aclrtPtrAttributes{};
  attributes->pageSize = static_cast<uint32_t>(page_size());
  const auto allocation = MemoryMap::instance().find(ptr);
  if (!allocation || allocation->kind == Allocation::Kind::kReserved) {
    attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  } else if (allocation->on_device()) {
    attributes->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
    attributes->location.id = static_cast<uint32_t>(allocation->device->id);
  } else {
    attributes->location.type = ACL_MEM_LOCATION_TYPE_HOST;
  }
  return ACL_SUCCESS;
}

aclError aclrtMemGetAddressRange(void* ptr, void** pbase, size_t* psize) {
  const auto allocation = MemoryMap::instance().find(ptr);
  if (!allocation || !allocation->on_device()) {
    return fail(ACL_ERROR_INVALID_PARAM,
                "aclrtMemGetAddressRange: the address is not in the memory of a device");
  }
  if (pbase != nullptr) *pbase = reinterpret_cast<void*>(allocation->base);
  if (psize != nullptr) *psize = allocation->bytes;
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  if (free == nullptr) return fail_null("aclrtGetMemInfo", "free");
  if (total == nullptr) return fail_null("aclrtGetMemInfo", "total");
  const Context* context = require_context("aclrtGetMemInfo");
  if (context == nullptr) return last_error();
  *total = context->device.memory.total();
  *free = *total - context->device.memory.used();
  return ACL_SUCCESS;
}

aclError aclrtGetMemUsageInfo(int32_t deviceId, aclrtMemUsageInfo* memUsageInfo, size_t inputNum,
                              size_t* outputNum) {
  const Device* device = find_device(deviceId, "aclrtGetMemUsageInfo");
  if (device == nullptr) return last_error();
  if (memUsageInfo == nullptr || inputNum == 0) return fail_null("aclrtGetMemUsageInfo", "memUsageInfo");
  if (outputNum == nullptr) return fail_null("aclrtGetMemUsageInfo", "outputNum");
  memUsageInfo[0] = aclrtMemUsageInfo{};
  std::strncpy(memUsageInfo[0].name, "APP", sizeof memUsageInfo[0].name - 1);
  memUsageInfo[0].curMemSize = device->memory.used();
  memUsageInfo[0].memPeakSize = device->memory.peak();
  *outputNum = 1;
  return ACL_SUCCESS;
}
