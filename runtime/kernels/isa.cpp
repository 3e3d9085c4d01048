#include "runtime/kernels/isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <string_view>

namespace host_runtime::kernels {
namespace {

#if defined(__x86_64__)
/// Whether the processor has AMX and Linux gives this process the tiles' state, which it has to be asked for
/// (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("avx512vbmi") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

InstructionSet supported() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd"))
    return !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")
               ? InstructionSet::kAvx512
           : may_use_tiles() ? InstructionSet::kTiles
                             : InstructionSet::kAvx512Dots;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

InstructionSet decide() {
  const InstructionSet best = supported();
  const char* wish = std::getenv("NPU_COMPILER_HOST_ISA");
  if (wish == nullptr) return best;
  const std::string_view name(wish);
  if (name == "baseline") return InstructionSet::kBaseline;
  if (name == "avx2") return std::min(best, InstructionSet::kAvx2);
  if (name == "avx512") return std::min(best, InstructionSet::kAvx512);
  if (name == "avx512_dots") return std::min(best, InstructionSet::kAvx512Dots);
  return best;
}

}  // namespace

InstructionSet this_machine() {
  static const InstructionSet chosen = decide();
  return chosen;
}

}  // namespace host_runtime::kernels

/// The name of this_machine(), for npu_compiler/runtime/instruction_set.py.
extern "C" __attribute__((visibility("default"))) const char* hostRuntimeInstructionSet() {
  static constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_dots", "amx"};
  return kNames[static_cast<size_t>(host_runtime::kernels::this_machine())];
}
