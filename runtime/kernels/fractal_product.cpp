#include "runtime/kernels/fractal_product.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "runtime/kernels/fractal_tiles.h"
#include "runtime/kernels/isa.h"
#include "runtime/kernels/share.h"

namespace host_runtime::kernels {

#define KERNEL_SOURCE "runtime/kernels/fractal_product.inc"
#include "runtime/kernels/per_isa.h"

namespace {

template <typename T>
void shared_product(const FractalProduct& p, float* scratch) {
  PER_ISA(widen_rows<T>)(p, scratch);
  const auto run = PER_ISA(fractal_columns<T>);
  constexpr int64_t kColumns = 4 * kFractalWidth;
  share_columns(p.inner, p.columns, kColumns,
                [&](int64_t begin, int64_t end) { run(p, scratch, begin, end); });
}

}  // namespace

void fractal_product(const FractalProduct& product, float* scratch) {
  if (takes_tiles(product)) return fractal_tiles(product, scratch);
  if (product.type == Type::kBFloat) return shared_product<BFloat>(product, scratch);
  if (product.type == Type::kHalf) return shared_product<Half>(product, scratch);
  throw std::invalid_argument("products read FRACTAL_NZ weights of float16 and bfloat16 only");
}

}  // namespace host_runtime::kernels
