#include "runtime/hccl/rank_table.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <regex>
#include <set>
#include <sstream>

#include "runtime/hccl/errors.h"

namespace host_runtime::hccl {

RankTable read_rank_table(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Error(HCCL_E_OPEN_FILE_FAILURE, "cannot read the rank table " + path);
  std::stringstream content;
  content << file.rdbuf();
  const std::string text = content.str();
  // All that matters on one machine is which ranks there are; the addresses are of no use here.
  static const std::regex entry("\"rank_id\"\\s*:\\s*\"(\\d{1,6})\"");
  std::set<uint32_t> ranks;
  for (std::sregex_iterator match(text.begin(), text.end(), entry), end; match != end; ++match) {
    if (!ranks.insert(static_cast<uint32_t>(std::stoul((*match)[1]))).second) {
      throw Error(HCCL_E_PARA, "rank_id " + (*match)[1].str() + " appears twice in the rank table " + path);
    }
  }
  if (ranks.empty() || *ranks.rbegin() + 1 != ranks.size()) {
    throw Error(HCCL_E_PARA, "the rank table " + path +
                                 " must name every rank_id from 0 to n-1 once; it names " +
                                 std::to_string(ranks.size()) + " of them");
  }
  char name[96];
  std::snprintf(name, sizeof(name), "/npu_compiler_hccl_table_%u_%016zx", getuid(),
                std::hash<std::string>()(text));
  return {static_cast<uint32_t>(ranks.size()), name};
}

}  // namespace host_runtime::hccl
