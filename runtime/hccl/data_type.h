// HCCL's data types and reductions: sizes, names, and which call takes which (CANN 8.5, Atlas A2 and A3).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "hccl/hccl.h"

namespace host_runtime::hccl {

/// Bytes of one element; 0 for a value that is no HcclDataType.
size_t element_bytes(HcclDataType type);
std::string data_type_name(uint32_t type);
std::string reduction_name(uint32_t op);

/// Throws Error(HCCL_E_NOT_SUPPORT) unless `type` may be moved between ranks.
void require_movable(HcclDataType type);

/// Throws Error(HCCL_E_NOT_SUPPORT) unless `type` may be reduced with `op`: int8, int16, int32, int64,
/// float16, float32 and bfloat16, but prod neither in int16 nor in bfloat16. The V variant takes no int64 and
/// no int16 and no prod.
void require_reducible(HcclDataType type, HcclReduceOp op, bool variable_counts);

}  // namespace host_runtime::hccl
