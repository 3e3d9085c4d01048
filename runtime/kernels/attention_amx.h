// Attention of bfloat16 by AMX: products of tiles, and a softmax that reads each score twice.
#pragma once

#include "runtime/kernels/attention.h"

namespace host_runtime::kernels {

/// Rows of a tile of work: keys and values are packed once for all of them.
constexpr int64_t kAmxQueryTile = 256;

/// Whether attend_amx computes tiles of many rows on this machine.
bool takes_amx(const Attention& arguments);

/// Floats of scratch that a worker needs.
int64_t amx_scratch(const Attention& arguments);

/// The tile's rows of the output, lse, row_max and row_sum; at most kAmxQueryTile rows.
void attend_amx(const Attention& arguments, const Tile& tile, float* scratch);

}  // namespace host_runtime::kernels
