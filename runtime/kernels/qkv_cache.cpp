#include "runtime/kernels/qkv_cache.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "runtime/kernels/isa.h"

namespace host_runtime::kernels {

#define KERNEL_HAS_DOTS
#define KERNEL_SOURCE "runtime/kernels/qkv_cache.inc"
#include "runtime/kernels/per_isa.h"

namespace {

void check_slots(const QkvCache& a) {
  const int64_t slots = a.key.cache.blocks * a.key.cache.block_size;
  for (int64_t token = 0; token < a.tokens; ++token)
    if (a.slots[token] < -1 || a.slots[token] >= slots)
      throw std::out_of_range("index has " + std::to_string(a.slots[token]) + " for token " +
                              std::to_string(token) + ", but has to lie in [-1, " + std::to_string(slots) +
                              "), the slots of the cache");
}

}  // namespace

void qkv_cache(const QkvCache& arguments) {
  check_slots(arguments);
  visit(arguments.type, [&](auto zero) { PER_ISA_OR_DOTS(qkv_cache_rows<decltype(zero)>)(arguments); });
}

}  // namespace host_runtime::kernels
