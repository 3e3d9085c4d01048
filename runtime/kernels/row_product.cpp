#include "runtime/kernels/row_product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime/kernels/fetch.h"
#include "runtime/kernels/isa.h"
#include "runtime/kernels/scalar.h"
#include "runtime/kernels/share.h"

namespace host_runtime::kernels {

#define KERNEL_HAS_DOTS
#define KERNEL_SOURCE "runtime/kernels/row_product.inc"
#include "runtime/kernels/per_isa.h"

namespace {

/// Columns at whose multiples threads take over: whole blocks of the kernel.
constexpr int64_t kTransposedBlock = 32, kPlainBlock = 128;

template <typename T, bool kTransposed>
void shared_gemv(const Gemv& planned) {
  Gemv p = planned;
  p.cached = host_runtime::replays_cached_weights();
  const auto run = kTransposed ? PER_ISA_OR_DOTS(gemv_transposed<T>) : PER_ISA(gemv_plain<T>);
  share_columns(p.inner, p.columns, kTransposed ? kTransposedBlock : kPlainBlock,
                [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

GemvKernel gemv_kernel(Type type, bool transposed) {
  return visit(type, [&](auto zero) -> GemvKernel {
    using T = decltype(zero);
    return transposed ? &shared_gemv<T, true> : &shared_gemv<T, false>;
  });
}

int64_t gemv_rows(Type type, bool transposed) {
  // Sixteen sums in registers keep pace with a blocked product, which has to pack the weights first.
  const bool keeps_pace = type == Type::kFloat && transposed && this_machine() >= InstructionSet::kAvx512;
  return keeps_pace ? 64 : 8;
}

}  // namespace host_runtime::kernels
