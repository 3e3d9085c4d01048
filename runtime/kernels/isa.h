// Which of the compiled instruction sets this machine runs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KERNEL_INLINE inline __attribute__((always_inline))

namespace host_runtime::kernels {

/// From least to most; kAvx512Dots is AVX-512 with dot products of bfloat16 and of bytes, kTiles that with
/// AMX's products of bfloat16 and int8 tiles and with permutations of bytes.
enum class InstructionSet : uint8_t { kBaseline, kAvx2, kAvx512, kAvx512Dots, kTiles };

/// The best set that the processor has and the system lets us use, or what
/// NPU_COMPILER_HOST_ISA=baseline|avx2|avx512|avx512_dots lowers it to (tests run every copy that way).
/// Decided once.
InstructionSet this_machine();

}  // namespace host_runtime::kernels
