// Compiles KERNEL_SOURCE once per instruction set, each copy in its own namespace with simd.inc before it,
// and defines PER_ISA(function<...>), which calls the copy for this machine. Include it inside namespace
// host_runtime::kernels, after everything KERNEL_SOURCE needs. A source that gains by the instructions for
// bfloat16 (dot products, rounding) defines KERNEL_HAS_DOTS: it is compiled once more, with KERNEL_DOTS, and
// calls by PER_ISA_OR_DOTS. The pragma has to stand before the code is parsed: vector types that the target
// lacks are taken apart there, so target_clones would come too late.

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

#ifdef KERNEL_HAS_DOTS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
namespace avx512_dots {
#define KERNEL_LANES 16
#define KERNEL_DOTS
#include "runtime/kernels/simd.inc"
#include KERNEL_SOURCE
#undef KERNEL_DOTS
#undef KERNEL_LANES
}  // namespace avx512_dots
#pragma GCC pop_options
#endif

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
  (this_machine() >= InstructionSet::kAvx512 ? &avx512::__VA_ARGS__ \
   : this_machine() == InstructionSet::kAvx2 ? &avx2::__VA_ARGS__   \
                                             : &baseline::__VA_ARGS__)
#define PER_ISA_OR_DOTS(...) \
  (this_machine() >= InstructionSet::kAvx512Dots ? &avx512_dots::__VA_ARGS__ : PER_ISA(__VA_ARGS__))
#else
#define PER_ISA(...) (&baseline::__VA_ARGS__)
#define PER_ISA_OR_DOTS(...) PER_ISA(__VA_ARGS__)
#endif

namespace baseline {
#define KERNEL_LANES 4
#include "runtime/kernels/simd.inc"
#include KERNEL_SOURCE
#undef KERNEL_LANES
}  // namespace baseline
