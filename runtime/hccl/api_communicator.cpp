// The C entry points that make, describe and destroy communicators.
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "runtime/hccl/errors.h"
#include "runtime/hccl/handles.h"
#include "runtime/hccl/rank_table.h"
#include "runtime/hccl/settings.h"

#define HCCL_API extern "C" __attribute__((visibility("default")))

namespace host_runtime::hccl {
namespace {

/// What HcclRootInfo holds here.
struct RootInfo {
  char magic[8];
  char segment[96];
};
constexpr char kMagic[8] = {'N', 'P', 'U', 'C', 'H', 'C', 'C', '1'};
static_assert(sizeof(RootInfo) <= sizeof(HcclRootInfo));

/// The first fields of HcclCommConfig, which HcclCommConfigInit hides in `reserved`.
struct ConfigHeader {
  size_t size;
  uint32_t magic;
  uint32_t version;
  uint64_t reserved;
};

void require(const void* pointer, const char* name) {
  if (pointer == nullptr) throw Error(HCCL_E_PTR, std::string(name) + " is a null pointer");
}

CommunicatorOptions options_from(const HcclCommConfig* config) {
  CommunicatorOptions options;
  options.exec_timeout = exec_timeout();
  options.buffer_bytes = buffer_bytes();
  if (config == nullptr) return options;
  ConfigHeader header;
  std::memcpy(&header, config, sizeof(header));
  if (header.magic != HCCL_COMM_CONFIG_MAGIC_WORD) {
    throw Error(HCCL_E_PARA, "the HcclCommConfig was not set up with HcclCommConfigInit");
  }
  options.name.assign(config->hcclCommName, strnlen(config->hcclCommName, COMM_NAME_MAX_LENGTH));
  if (config->hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET)
    options.buffer_bytes = uint64_t{config->hcclBufferSize} << 20;
  // Callers built with an older header pass a shorter structure.
  const bool has_timeout = header.size >= offsetof(HcclCommConfig, hcclExecTimeOut) + sizeof(int32_t);
  if (has_timeout && config->hcclExecTimeOut != HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET) {
    if (config->hcclExecTimeOut < 0) throw Error(HCCL_E_PARA, "hcclExecTimeOut is negative");
    options.exec_timeout = std::chrono::seconds(config->hcclExecTimeOut);
  }
  return options;
}

std::string segment_from(const HcclRootInfo* root) {
  require(root, "rootInfo");
  RootInfo info;
  std::memcpy(&info, root->internal, sizeof(info));
  if (std::memcmp(info.magic, kMagic, sizeof(kMagic)) != 0) {
    throw Error(HCCL_E_PARA, "the root info does not come from HcclGetRootInfo of this library; send all " +
                                 std::to_string(HCCL_ROOT_INFO_BYTES) +
                                 " bytes of it from one rank to the others");
  }
  return std::string(info.segment, strnlen(info.segment, sizeof(info.segment)));
}

void require_ranks(uint32_t ranks, uint32_t rank) {
  if (ranks == 0 || rank >= ranks) {
    throw Error(HCCL_E_PARA, "rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " ranks");
  }
  if (ranks > kMaxRanks) {
    throw Error(HCCL_E_NOT_SUPPORT, std::to_string(ranks) + " ranks; the host runtime has at most " +
                                        std::to_string(kMaxRanks) + " in one communicator");
  }
}

HcclResult join(const std::string& segment, uint32_t ranks, uint32_t rank, const CommunicatorOptions& options,
                HcclComm* comm) {
  require(comm, "comm");
  require_ranks(ranks, rank);
  const auto patience = connect_timeout();
  auto communicator = std::make_shared<Communicator>(segment, ranks, rank, options);
  communicator->wait_for_all(patience);
  *comm = publish(std::move(communicator));
  return HCCL_SUCCESS;
}

HcclResult join_root(uint32_t ranks, const HcclRootInfo* root, uint32_t rank, const HcclCommConfig* config,
                     HcclComm* comm) {
  return join(segment_from(root), ranks, rank, options_from(config), comm);
}

HcclResult join_table(const char* path, uint32_t rank, const HcclCommConfig* config, HcclComm* comm) {
  require(path, "clusterInfo");
  const RankTable table = read_rank_table(path);
  remove_stale_segment(table.segment);
  return join(table.segment, table.ranks, rank, options_from(config), comm);
}

/// The same on all members: what the parent is called, who takes part, and how often they did so before.
std::string sub_segment_name(Communicator& parent, uint64_t id, const std::vector<uint32_t>& members) {
  std::string key = std::to_string(id);
  for (uint32_t member : members) key += "," + std::to_string(member);
  char suffix[64];
  std::snprintf(suffix, sizeof(suffix), "_%zx_%zx", std::hash<std::string>()(key),
                static_cast<size_t>(parent.next_sub_communicator(key)));
  return parent.segment_name() + suffix;
}

HcclResult join_sub(HcclComm* parent, uint32_t count, const uint32_t* ids, uint64_t sub_id, uint32_t sub_rank,
                    const HcclCommConfig* config, HcclComm* comm) {
  require(parent, "comm");
  require(comm, "subComm");
  const CommunicatorPtr whole = resolve(*parent);
  constexpr uint64_t kNotMember = 0xFFFFFFFF;
  if (ids == nullptr && sub_id == kNotMember) {
    *comm = nullptr;
    return HCCL_SUCCESS;
  }
  require(ids, "rankIds");
  const std::vector<uint32_t> members(ids, ids + count);
  if (std::any_of(members.begin(), members.end(), [&](uint32_t id) { return id >= whole->size(); })) {
    throw Error(HCCL_E_PARA, "rankIds names a rank that the communicator of " +
                                 std::to_string(whole->size()) + " does not have");
  }
  if (sub_rank >= count || members[sub_rank] != whole->rank()) {
    throw Error(HCCL_E_PARA, "subCommRankId " + std::to_string(sub_rank) + " does not stand for rank " +
                                 std::to_string(whole->rank()) + " in rankIds");
  }
  return join(sub_segment_name(*whole, sub_id, members), count, sub_rank, options_from(config), comm);
}

}  // namespace
}  // namespace host_runtime::hccl

using namespace host_runtime::hccl;

HCCL_API HcclResult HcclGetRootInfo(HcclRootInfo* rootInfo) {
  return guarded("HcclGetRootInfo", [&] {
    require(rootInfo, "rootInfo");
    remove_abandoned_segments();
    RootInfo info{};
    std::memcpy(info.magic, kMagic, sizeof(kMagic));
    std::snprintf(info.segment, sizeof(info.segment), "%s", fresh_segment_name().c_str());
    std::memset(rootInfo, 0, sizeof(*rootInfo));
    std::memcpy(rootInfo->internal, &info, sizeof(info));
    return HCCL_SUCCESS;
  });
}

HCCL_API HcclResult HcclGetRootInfoScalable(HcclRootInfo* rootInfo) { return HcclGetRootInfo(rootInfo); }

HCCL_API HcclResult HcclCommInitRootInfo(uint32_t nRanks, const HcclRootInfo* rootInfo, uint32_t rank,
                                         HcclComm* comm) {
  return guarded("HcclCommInitRootInfo", [&] { return join_root(nRanks, rootInfo, rank, nullptr, comm); });
}

HCCL_API HcclResult HcclCommInitRootInfoConfig(uint32_t nRanks, const HcclRootInfo* rootInfo, uint32_t rank,
                                               const HcclCommConfig* config, HcclComm* comm) {
  return guarded("HcclCommInitRootInfoConfig", [&] {
    require(config, "config");
    return join_root(nRanks, rootInfo, rank, config, comm);
  });
}

HCCL_API HcclResult HcclCommInitRootInfoScalable(uint32_t nRanks, uint32_t nRoot,
                                                 const HcclRootInfo* rootInfoList, uint32_t rank,
                                                 uint32_t nExtRoot, const HcclCommConfig* config,
                                                 HcclComm* comm) {
  return guarded("HcclCommInitRootInfoScalable", [&] {
    if (nRoot == 0 || nExtRoot != 0) throw Error(HCCL_E_PARA, "nRoot must be positive and nExtRoot 0");
    // The list is the same on every rank, so its first entry is enough to meet.
    return join_root(nRanks, rootInfoList, rank, config, comm);
  });
}

HCCL_API HcclResult HcclCommInitClusterInfo(const char* clusterInfo, uint32_t rank, HcclComm* comm) {
  return guarded("HcclCommInitClusterInfo", [&] { return join_table(clusterInfo, rank, nullptr, comm); });
}

HCCL_API HcclResult HcclCommInitClusterInfoConfig(const char* clusterInfo, uint32_t rank,
                                                  HcclCommConfig* config, HcclComm* comm) {
  return guarded("HcclCommInitClusterInfoConfig", [&] {
    require(config, "config");
    return join_table(clusterInfo, rank, config, comm);
  });
}

HCCL_API HcclResult HcclCreateSubCommConfig(HcclComm* comm, uint32_t rankNum, uint32_t* rankIds,
                                            uint64_t subCommId, uint32_t subCommRankId,
                                            HcclCommConfig* config, HcclComm* subComm) {
  return guarded("HcclCreateSubCommConfig",
                 [&] { return join_sub(comm, rankNum, rankIds, subCommId, subCommRankId, config, subComm); });
}

HCCL_API HcclResult HcclCommInitAll(uint32_t ndev, int32_t* devices, HcclComm* comms) {
  return guarded("HcclCommInitAll", [&] {
    require(devices, "devices");
    require(comms, "comms");
    require_ranks(ndev, 0);
    const std::string segment = fresh_segment_name();
    const CommunicatorOptions options = options_from(nullptr);
    std::vector<CommunicatorPtr> all;
    for (uint32_t rank = 0; rank < ndev; ++rank) {
      all.push_back(std::make_shared<Communicator>(segment, ndev, rank, options));
    }
    for (uint32_t rank = 0; rank < ndev; ++rank) comms[rank] = publish(all[rank]);
    return HCCL_SUCCESS;
  });
}

HCCL_API HcclResult HcclCommDestroy(HcclComm comm) {
  return guarded("HcclCommDestroy", [&] {
    withdraw(comm);
    return HCCL_SUCCESS;
  });
}

HCCL_API HcclResult HcclGetRankSize(HcclComm comm, uint32_t* rankSize) {
  return guarded("HcclGetRankSize", [&] {
    require(rankSize, "rankSize");
    *rankSize = resolve(comm)->size();
    return HCCL_SUCCESS;
  });
}

HCCL_API HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  return guarded("HcclGetRankId", [&] {
    require(rank, "rank");
    *rank = resolve(comm)->rank();
    return HCCL_SUCCESS;
  });
}

HCCL_API HcclResult HcclGetCommName(HcclComm comm, char* commName) {
  return guarded("HcclGetCommName", [&] {
    require(commName, "commName");
    std::snprintf(commName, COMM_NAME_MAX_LENGTH, "%s", resolve(comm)->name().c_str());
    return HCCL_SUCCESS;
  });
}

HCCL_API HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* asyncError) {
  return guarded("HcclGetCommAsyncError", [&] {
    require(asyncError, "asyncError");
    *asyncError = resolve(comm)->async_error();
    return HCCL_SUCCESS;
  });
}
