// Memory of devices and memory of the host that devices may reach.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <string>

#include "runtime/acl/device.h"

namespace host_runtime {

/// A range of addresses that the host runtime handed out or was told of.
struct Allocation {
  enum class Kind {
    kDevice,      ///< aclrtMalloc: private anonymous pages
    kSmall,       ///< aclrtMalloc of less than a page: from the heap
    kShared,      ///< device memory in a file, which other processes can map
    kImported,    ///< device memory of another process
    kPinned,      ///< aclrtMallocHost
    kRegistered,  ///< the caller's memory, aclrtHostRegister
    kReserved,    ///< addresses without memory (aclrtReserveMemAddress)
    kMapped,      ///< addresses with memory (aclrtMapMem)
  };

  uintptr_t base;
  size_t bytes;    ///< that the caller asked for
  size_t charged;  ///< that the device's account was charged
  Kind kind;
  Device* device;           ///< null for host memory
  int64_t file_offset = 0;  ///< of kShared: where in the device's file

  bool on_device() const {
    return kind != Kind::kPinned && kind != Kind::kRegistered && kind != Kind::kReserved;
  }
  bool contains(uintptr_t address, size_t size) const {
    return address >= base && size <= bytes && address - base <= bytes - size;
  }
};

/// Every allocation of the process, by address.
class MemoryMap {
 public:
  static MemoryMap& instance();

  void add(const Allocation& allocation);
  /// The allocation that begins at `base`, taken out of the map, if it is of one of `kinds`.
  std::optional<Allocation> remove(const void* base, std::initializer_list<Allocation::Kind> kinds);
  /// The innermost allocation that holds `address` (a mapping inside a reservation before the reservation).
  std::optional<Allocation> find(const void* address) const;

 private:
  mutable std::shared_mutex mutex_;
  std::map<uintptr_t, Allocation> allocations_;
  std::map<uintptr_t, Allocation> reservations_;
};

/// 207001, with what was wanted, free and total.
aclError fail_out_of_memory(const Device& device, size_t wanted, const char* function);

/// Private zero pages; null when the host has no address space left.
void* map_pages(size_t bytes);

/// Gives an allocation's pages back to the host; its device's account is the caller's business.
void release_pages(const Allocation& allocation);

size_t page_size();
inline size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace host_runtime
