#include "runtime/acl/bounds.h"

#include "runtime/acl/memory.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace host_runtime::bounds {
namespace {

std::shared_mutex& one_at_a_time() {
  static auto* const mutex = new std::shared_mutex;
  return *mutex;
}

}  // namespace

OnlyThese::OnlyThese(const std::vector<MemoryAccess>& touched) : alone_(one_at_a_time()) {
  for (const MemoryAccess& access : touched) {
    const auto allocation = MemoryMap::instance().find(access.address);
    if (!allocation || !allocation->on_device()) continue;
    around_.push_back(
        {reinterpret_cast<void*>(allocation->base), allocation->bytes, MemoryAccess::Mode::kReadWrite});
  }
  for (const MemoryAccess& whole : around_) ASAN_POISON_MEMORY_REGION(whole.address, whole.bytes);
  for (const MemoryAccess& access : touched) ASAN_UNPOISON_MEMORY_REGION(access.address, access.bytes);
}

OnlyThese::~OnlyThese() {
  for (const MemoryAccess& whole : around_) ASAN_UNPOISON_MEMORY_REGION(whole.address, whole.bytes);
}

std::shared_lock<std::shared_mutex> lifted() {
  return kKept ? std::shared_lock(one_at_a_time()) : std::shared_lock<std::shared_mutex>();
}

}  // namespace host_runtime::bounds
