#include "runtime/kernels/row_product.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <cstring>

#include "runtime/kernels/isa.h"
#include "runtime/kernels/scalar.h"

namespace host_runtime::kernels {

#define KERNEL_SOURCE "runtime/kernels/row_product.inc"
#include "runtime/kernels/per_isa.h"

namespace {

/// Weights below which sharing does not pay: it saves tens of microseconds, and a thread that has to wait for
/// its processor costs hundreds.
constexpr int64_t kParallelWeights = int64_t{1} << 20;
/// Columns at whose multiples threads take over: whole blocks of either kernel.
constexpr int64_t kColumnBlock = 128;

template <typename T, bool kTransposed>
void shared_gemv(const Gemv& p) {
  const auto run = kTransposed ? PER_ISA(gemv_transposed<T>) : PER_ISA(gemv_plain<T>);
  if (p.inner * p.columns < kParallelWeights) return run(p, 0, p.columns);
  at::parallel_for(0, (p.columns + kColumnBlock - 1) / kColumnBlock, 1, [&](int64_t begin, int64_t end) {
    run(p, begin * kColumnBlock, std::min(end * kColumnBlock, p.columns));
  });
}

}  // namespace

GemvKernel gemv_kernel(Type type, bool transposed) {
  return visit(type, [&](auto zero) -> GemvKernel {
    using T = decltype(zero);
    return transposed ? &shared_gemv<T, true> : &shared_gemv<T, false>;
  });
}

}  // namespace host_runtime::kernels
