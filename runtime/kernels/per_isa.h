// Compiles KERNEL_SOURCE once per instruction set, each copy in its own namespace with simd.inc before it,
// and defines PER_ISA(function<...>), which calls the copy for this machine. Include it inside namespace
// host_runtime::kernels, after everything KERNEL_SOURCE needs. The pragma has to stand before the code is
// parsed: vector types that the target lacks are taken apart there, so target_clones would come too late.

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace avx512 {
#define KERNEL_LANES 16
#include "runtime/kernels/simd.inc"
#include KERNEL_SOURCE
#undef KERNEL_LANES
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define KERNEL_LANES 8
#include "runtime/kernels/simd.inc"
#include KERNEL_SOURCE
#undef KERNEL_LANES
}  // namespace avx2
#pragma GCC pop_options
#define PER_ISA(...)                                                \
  (this_machine() == InstructionSet::kAvx512 ? &avx512::__VA_ARGS__ \
   : this_machine() == InstructionSet::kAvx2 ? &avx2::__VA_ARGS__   \
                                             : &baseline::__VA_ARGS__)
#else
#define PER_ISA(...) (&baseline::__VA_ARGS__)
#endif

namespace baseline {
#define KERNEL_LANES 4
#include "runtime/kernels/simd.inc"
#include KERNEL_SOURCE
#undef KERNEL_LANES
}  // namespace baseline
