// Products of bfloat16 rows with a matrix in FRACTAL_NZ by AMX, which multiplies tiles of 16 rows.
#pragma once

#include "runtime/kernels/fractal_product.h"

namespace host_runtime::kernels {

/// From more rows on, panels that are packed once for all of them win.
constexpr int64_t kFractalTilesRows = 32;

/// Whether fractal_tiles computes the product on this machine, and does so before the vector kernels.
bool takes_tiles(const FractalProduct& product);

/// As fractal_product, on up to kFractalTilesRows rows. `scratch` has room for product.scratch() floats.
void fractal_tiles(const FractalProduct& product, float* scratch);

}  // namespace host_runtime::kernels
