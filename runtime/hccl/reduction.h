// Elementwise reductions over the contributions of all ranks.
#pragma once

#include <cstddef>
#include <vector>

#include "hccl/hccl.h"

namespace host_runtime::hccl {

/// out[i] = sources[0][i] op sources[1][i] op ..., always in the order of the ranks, so that every rank gets
/// the same bits. float16 and bfloat16 are accumulated in float32 and rounded once. `out` may be one of the
/// sources.
void reduce(HcclDataType type, HcclReduceOp op, const std::vector<const void*>& sources, void* out,
            size_t count);

}  // namespace host_runtime::hccl
