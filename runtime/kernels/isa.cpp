#include "runtime/kernels/isa.h"

#include <cstdlib>
#include <string_view>

namespace host_runtime::kernels {
namespace {

InstructionSet supported() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd"))
    return __builtin_cpu_supports("avx512bf16") ? InstructionSet::kAvx512Dots : InstructionSet::kAvx512;
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
  return best;
}

}  // namespace

InstructionSet this_machine() {
  static const InstructionSet chosen = decide();
  return chosen;
}

}  // namespace host_runtime::kernels
