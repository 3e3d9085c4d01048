// Bounds of single tensors, in builds under the address sanitizer; elsewhere there is nothing to test.
#include "runtime/acl/bounds.h"

#include <memory>

#include "tests/runtime/native/check.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>

namespace {

using host_runtime::MemoryAccess;
using host_runtime::bounds::OnlyThese;

bool addressable(const char* byte) { return __asan_address_is_poisoned(byte) == 0; }

/// Of a small allocation, which comes from the heap, and of one of pages.
void nothing_beside_what_is_touched(size_t bytes) {
  void* memory = nullptr;
  CHECK_OK(aclrtMalloc(&memory, bytes, ACL_MEM_MALLOC_HUGE_FIRST));
  auto* byte = static_cast<char*>(memory);
  {
    // The sanitizer's grain is 8 bytes: a beginning is rounded down to it, an end is exact.
    const OnlyThese kept(
        {{byte + 64, 100, MemoryAccess::Mode::kRead}, {byte + 256, 3, MemoryAccess::Mode::kWrite}});
    CHECK(!addressable(byte));
    CHECK(!addressable(byte + 63));
    CHECK(addressable(byte + 64));
    CHECK(addressable(byte + 163));
    CHECK(!addressable(byte + 164));
    CHECK(addressable(byte + 258));
    CHECK(!addressable(byte + 259));
    CHECK(!addressable(byte + bytes - 1));
  }
  for (size_t i = 0; i < bytes; ++i) CHECK(addressable(byte + i));
  CHECK_OK(aclrtFree(memory));
}

void only_what_an_operator_touches_is_addressable() {
  nothing_beside_what_is_touched(512);
  nothing_beside_what_is_touched(size_t{3} << 20);
}

void host_memory_stays_addressable() {
  const auto memory = std::make_unique<char[]>(64);
  const OnlyThese kept({{memory.get(), 8, MemoryAccess::Mode::kRead}});
  CHECK(addressable(memory.get() + 63));
}

}  // namespace

extern const TestCase kBoundsTests[] = {
    {"only_what_an_operator_touches_is_addressable", only_what_an_operator_touches_is_addressable},
    {"host_memory_stays_addressable", host_memory_stays_addressable},
    {nullptr, nullptr}};
#else
extern const TestCase kBoundsTests[] = {{nullptr, nullptr}};
#endif
