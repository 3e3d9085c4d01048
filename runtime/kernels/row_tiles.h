// Products of bfloat16 rows with the weight of a linear layer by AMX, which multiplies tiles of 16 rows.
#pragma once

#include <cstddef>

#include "runtime/kernels/row_product.h"

namespace host_runtime::kernels {

/// Up to as many rows the tiles of x stay in the cache beside the weights, which are read once.
constexpr int64_t kRowTilesRows = 64;

/// Whether row_tiles computes such products on this machine, and does so before the vector kernels and ATen.
bool takes_row_tiles(const Gemv& product, Type type, bool transposed);

/// Bytes of scratch that row_tiles needs.
size_t row_tiles_scratch(const Gemv& product);

/// As gemv_kernel(Type::kBFloat, true): sums in float, rounded once; numbers below 2^-126 count as zeros.
void row_tiles(const Gemv& product, void* scratch);

}  // namespace host_runtime::kernels
