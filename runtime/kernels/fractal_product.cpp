#include "runtime/kernels/fractal_product.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "runtime/kernels/fractal_tiles.h"
#include "runtime/kernels/isa.h"
#include "runtime/kernels/panel_product.h"
#include "runtime/kernels/share.h"

namespace host_runtime::kernels {

#define KERNEL_SOURCE "runtime/kernels/fractal_product.inc"
#include "runtime/kernels/per_isa.h"

namespace {

template <typename T>
void shared_rows(const FractalProduct& p, float* scratch) {
  PER_ISA(widen_rows<T>)(p, scratch);
  const auto run = PER_ISA(fractal_columns<T>);
  constexpr int64_t kColumns = 4 * kFractalWidth;
  share_columns(p.inner, p.columns, kColumns,
                [&](int64_t begin, int64_t end) { run(p, scratch, begin, end); });
}

template <typename T>
void shared_product(const FractalProduct& p, float* scratch) {
  for (int64_t row = 0; row < p.rows; row += kFractalRowBlock) {
    FractalProduct part = p;
    part.x = static_cast<const T*>(p.x) + row * p.inner;
    part.out = static_cast<T*>(p.out) + row * p.columns;
    part.rows = std::min(kFractalRowBlock, p.rows - row);
    shared_rows<T>(part, scratch);
  }
}

/// The same by panels of tiles.
void panels_of(const FractalProduct& p) {
  Gemv g{};
  g.x = p.x;
  g.out = p.out;
  g.bias = p.bias;
  g.batches = 1;
  g.rows = p.rows;
  g.inner = g.x_row = p.inner;
  g.columns = g.out_row = p.columns;
  g.alpha = g.beta = 1.0f;
  panel_product(g, {p.w, p.by_rows, kFractalWidth, p.block});
}

}  // namespace

void fractal_product(const FractalProduct& product, float* scratch) {
  if (takes_tiles(product)) return fractal_tiles(product, scratch);
  if (product.type == Type::kBFloat && product.rows > kFractalTilesRows && has_panels())
    return panels_of(product);
  if (product.type == Type::kBFloat) return shared_product<BFloat>(product, scratch);
  if (product.type == Type::kHalf) return shared_product<Half>(product, scratch);
  throw std::invalid_argument("products read FRACTAL_NZ weights of float16 and bfloat16 only");
}

}  // namespace host_runtime::kernels
