// The rank table file of HcclCommInitClusterInfo.
#pragma once

#include <cstdint>
#include <string>

namespace host_runtime::hccl {

struct RankTable {
  uint32_t ranks;
  std::string segment;  // the same name in every process that reads the same table
};

/// Reads the JSON file. Throws Error when it cannot be read, names no ranks, or names ranks other than
/// 0..n-1.
RankTable read_rank_table(const std::string& path);

}  // namespace host_runtime::hccl
