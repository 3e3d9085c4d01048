// The C entry points of the collectives: argument checks, then one task on the caller's stream.
#include <algorithm>

#include "runtime/hccl/data_type.h"
#include "runtime/hccl/errors.h"
#include "runtime/hccl/handles.h"

#define HCCL_API extern "C" __attribute__((visibility("default")))

namespace host_runtime::hccl {
namespace {

// HCCL's own limit of elements in one call.
constexpr uint64_t kMaxCount = 0x7FFFFFFFFULL;

void require_buffer(const void* address, uint64_t count, const char* name) {
  if (address == nullptr && count > 0) throw Error(HCCL_E_PTR, std::string(name) + " is a null pointer");
}

void require_count(uint64_t count) {
  if (count > kMaxCount) {
    throw Error(HCCL_E_PARA,
                "count " + std::to_string(count) + " is over HCCL's limit of " + std::to_string(kMaxCount));
  }
}

void require_rank(const Communicator& communicator, uint32_t rank, const char* name) {
  if (rank < communicator.size()) return;
  throw Error(HCCL_E_PARA, std::string(name) + " " + std::to_string(rank) +
                               " is no rank of a communicator of " + std::to_string(communicator.size()));
}

/// `ranks` equal parts of `bytes`, one after the other.
std::vector<Range> equal_parts(uint32_t ranks, uint64_t bytes) {
  std::vector<Range> parts(ranks);
  for (uint32_t rank = 0; rank < ranks; ++rank) parts[rank] = {rank * bytes, bytes};
  return parts;
}

/// Parts from HCCL's host arrays of element counts and displacements.
std::vector<Range> listed_parts(uint32_t ranks, const void* counts, const void* displacements, size_t element,
                                const char* name) {
  if (counts == nullptr || displacements == nullptr) {
    throw Error(HCCL_E_PTR, std::string("the ") + name + " counts or displacements are a null pointer");
  }
  const auto* count = static_cast<const uint64_t*>(counts);
  const auto* displacement = static_cast<const uint64_t*>(displacements);
  std::vector<Range> parts(ranks);
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    require_count(count[rank]);
    parts[rank] = {displacement[rank] * element, count[rank] * element};
  }
  return parts;
}

uint64_t total(const std::vector<Range>& parts) {
  uint64_t bytes = 0;
  for (const Range& part : parts) bytes += part.bytes;
  return bytes;
}

HcclResult enqueue(aclrtStream stream, CommunicatorPtr communicator, std::unique_ptr<Collective> collective,
                   const char* name) {
  launch(stream, std::make_shared<CollectiveTask>(std::move(communicator), std::move(collective), name));
  return HCCL_SUCCESS;
}

/// All-to-all in any form: the byte ranges are already known.
HcclResult enqueue_all_to_all(HcclCMDType kind, const char* name, const void* in, const void* out,
                              HcclDataType type, std::vector<Range> to, std::vector<Range> from,
                              CommunicatorPtr communicator, aclrtStream stream) {
  require_buffer(in, total(to), "sendBuf");
  require_buffer(out, total(from), "recvBuf");
  if (in == out && total(to) > 0) {
    throw Error(HCCL_E_PARA, "sendBuf and recvBuf are the same; HCCL has no all-to-all in place");
  }
  const uint32_t rank = communicator->rank();
  auto collective = make_exchange_parts(announce(kind, type, 0), in, const_cast<void*>(out), rank,
                                        std::move(to), std::move(from));
  return enqueue(stream, std::move(communicator), std::move(collective), name);
}

void require_same_type(HcclDataType send, HcclDataType receive) {
  require_movable(send);
  if (send == receive) return;
  throw Error(HCCL_E_PARA, "sendType " + data_type_name(send) + " and recvType " + data_type_name(receive) +
                               " differ; HCCL does not convert");
}

}  // namespace
}  // namespace host_runtime::hccl

using namespace host_runtime::hccl;

HCCL_API HcclResult HcclAllReduce(void* sendBuf, void* recvBuf, uint64_t count, HcclDataType dataType,
                                  HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  return guarded("HcclAllReduce", [&] {
    auto communicator = resolve(comm);
    require_count(count);
    require_reducible(dataType, op, false);
    require_buffer(sendBuf, count, "sendBuf");
    require_buffer(recvBuf, count, "recvBuf");
    Operation announced = announce(HCCL_CMD_ALLREDUCE, dataType, count);
    announced.reduction = op;
    return enqueue(stream, communicator, make_reduce(announced, sendBuf, recvBuf), "HcclAllReduce");
  });
}

HCCL_API HcclResult HcclReduce(void* sendBuf, void* recvBuf, uint64_t count, HcclDataType dataType,
                               HcclReduceOp op, uint32_t root, HcclComm comm, aclrtStream stream) {
  return guarded("HcclReduce", [&] {
    auto communicator = resolve(comm);
    require_count(count);
    require_rank(*communicator, root, "root");
    require_reducible(dataType, op, false);
    require_buffer(sendBuf, count, "sendBuf");
    const bool is_root = communicator->rank() == root;
    if (is_root) require_buffer(recvBuf, count, "recvBuf");
    Operation announced = announce(HCCL_CMD_REDUCE, dataType, count);
    announced.reduction = op;
    announced.root = root;
    return enqueue(stream, communicator, make_reduce(announced, sendBuf, is_root ? recvBuf : nullptr),
                   "HcclReduce");
  });
}

HCCL_API HcclResult HcclBroadcast(void* buf, uint64_t count, HcclDataType dataType, uint32_t root,
                                  HcclComm comm, aclrtStream stream) {
  return guarded("HcclBroadcast", [&] {
    auto communicator = resolve(comm);
    require_count(count);
    require_rank(*communicator, root, "root");
    require_movable(dataType);
    require_buffer(buf, count, "buf");
    Operation announced = announce(HCCL_CMD_BROADCAST, dataType, count);
    announced.root = root;
    std::vector<Range> parts(communicator->size());
    parts[root].bytes = count * element_bytes(dataType);
    return enqueue(stream, communicator, make_gather(announced, buf, buf, communicator->rank(), parts),
                   "HcclBroadcast");
  });
}

HCCL_API HcclResult HcclAllGather(void* sendBuf, void* recvBuf, uint64_t sendCount, HcclDataType dataType,
                                  HcclComm comm, aclrtStream stream) {
  return guarded("HcclAllGather", [&] {
    auto communicator = resolve(comm);
    require_count(sendCount);
    require_movable(dataType);
    require_buffer(sendBuf, sendCount, "sendBuf");
    require_buffer(recvBuf, sendCount, "recvBuf");
    auto parts = equal_parts(communicator->size(), sendCount * element_bytes(dataType));
    auto collective = make_gather(announce(HCCL_CMD_ALLGATHER, dataType, sendCount), sendBuf, recvBuf,
                                  communicator->rank(), std::move(parts));
    return enqueue(stream, communicator, std::move(collective), "HcclAllGather");
  });
}

HCCL_API HcclResult HcclAllGatherV(void* sendBuf, uint64_t sendCount, void* recvBuf, const void* recvCounts,
                                   const void* recvDispls, HcclDataType dataType, HcclComm comm,
                                   aclrtStream stream) {
  return guarded("HcclAllGatherV", [&] {
    auto communicator = resolve(comm);
    require_count(sendCount);
    require_movable(dataType);
    const size_t element = element_bytes(dataType);
    auto parts = listed_parts(communicator->size(), recvCounts, recvDispls, element, "receive");
    const uint32_t rank = communicator->rank();
    if (parts[rank].bytes != sendCount * element) {
      throw Error(HCCL_E_PARA, "sendCount " + std::to_string(sendCount) +
                                   " differs from this rank's recvCounts[" + std::to_string(rank) + "], " +
                                   std::to_string(parts[rank].bytes / element));
    }
    require_buffer(sendBuf, sendCount, "sendBuf");
    require_buffer(recvBuf, total(parts), "recvBuf");
    Operation announced = announce(HCCL_CMD_ALLGATHER_V, dataType, 0);
    for (uint32_t peer = 0; peer < communicator->size(); ++peer) {
      announced.bytes_to[peer] = sendCount * element;
      announced.bytes_from[peer] = parts[peer].bytes;
    }
    return enqueue(stream, communicator, make_gather(announced, sendBuf, recvBuf, rank, std::move(parts)),
                   "HcclAllGatherV");
  });
}

HCCL_API HcclResult HcclReduceScatter(void* sendBuf, void* recvBuf, uint64_t recvCount, HcclDataType dataType,
                                      HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  return guarded("HcclReduceScatter", [&] {
    auto communicator = resolve(comm);
    require_count(recvCount);
    require_reducible(dataType, op, false);
    require_buffer(sendBuf, recvCount, "sendBuf");
    require_buffer(recvBuf, recvCount, "recvBuf");
    Operation announced = announce(HCCL_CMD_REDUCE_SCATTER, dataType, recvCount);
    announced.reduction = op;
    auto parts = equal_parts(communicator->size(), recvCount * element_bytes(dataType));
    return enqueue(stream, communicator,
                   make_reduce_parts(announced, sendBuf, recvBuf, communicator->rank(), std::move(parts)),
                   "HcclReduceScatter");
  });
}

HCCL_API HcclResult HcclReduceScatterV(void* sendBuf, const void* sendCounts, const void* sendDispls,
                                       void* recvBuf, uint64_t recvCount, HcclDataType dataType,
                                       HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  return guarded("HcclReduceScatterV", [&] {
    auto communicator = resolve(comm);
    require_count(recvCount);
    require_reducible(dataType, op, true);
    const size_t element = element_bytes(dataType);
    auto parts = listed_parts(communicator->size(), sendCounts, sendDispls, element, "send");
    const uint32_t rank = communicator->rank();
    if (parts[rank].bytes != recvCount * element) {
      throw Error(HCCL_E_PARA, "recvCount " + std::to_string(recvCount) +
                                   " differs from this rank's sendCounts[" + std::to_string(rank) + "], " +
                                   std::to_string(parts[rank].bytes / element));
    }
    require_buffer(sendBuf, total(parts), "sendBuf");
    require_buffer(recvBuf, recvCount, "recvBuf");
    Operation announced = announce(HCCL_CMD_REDUCE_SCATTER_V, dataType, 0);
    announced.reduction = op;
    for (uint32_t peer = 0; peer < communicator->size(); ++peer) {
      announced.bytes_to[peer] = parts[peer].bytes;
      announced.bytes_from[peer] = recvCount * element;
    }
    return enqueue(stream, communicator,
                   make_reduce_parts(announced, sendBuf, recvBuf, rank, std::move(parts)),
                   "HcclReduceScatterV");
  });
}

HCCL_API HcclResult HcclScatter(void* sendBuf, void* recvBuf, uint64_t recvCount, HcclDataType dataType,
                                uint32_t root, HcclComm comm, aclrtStream stream) {
  return guarded("HcclScatter", [&] {
    auto communicator = resolve(comm);
    require_count(recvCount);
    require_rank(*communicator, root, "root");
    require_movable(dataType);
    const uint32_t rank = communicator->rank();
    const uint64_t bytes = recvCount * element_bytes(dataType);
    if (rank == root) require_buffer(sendBuf, recvCount, "sendBuf");
    require_buffer(recvBuf, recvCount, "recvBuf");
    Operation announced = announce(HCCL_CMD_SCATTER, dataType, recvCount);
    announced.root = root;
    std::vector<Range> to = equal_parts(communicator->size(), rank == root ? bytes : 0);
    std::vector<Range> from(communicator->size());
    from[root] = {0, bytes};
    return enqueue(stream, communicator,
                   make_exchange_parts(announced, sendBuf, recvBuf, rank, std::move(to), std::move(from)),
                   "HcclScatter");
  });
}

HCCL_API HcclResult HcclAlltoAll(const void* sendBuf, uint64_t sendCount, HcclDataType sendType,
                                 const void* recvBuf, uint64_t recvCount, HcclDataType recvType,
                                 HcclComm comm, aclrtStream stream) {
  return guarded("HcclAlltoAll", [&] {
    auto communicator = resolve(comm);
    require_same_type(sendType, recvType);
    require_count(std::max(sendCount, recvCount));
    const size_t element = element_bytes(sendType);
    const uint32_t ranks = communicator->size();
    return enqueue_all_to_all(HCCL_CMD_ALLTOALL, "HcclAlltoAll", sendBuf, recvBuf, sendType,
                              equal_parts(ranks, sendCount * element),
                              equal_parts(ranks, recvCount * element), communicator, stream);
  });
}

HCCL_API HcclResult HcclAlltoAllV(const void* sendBuf, const void* sendCounts, const void* sdispls,
                                  HcclDataType sendType, const void* recvBuf, const void* recvCounts,
                                  const void* rdispls, HcclDataType recvType, HcclComm comm,
                                  aclrtStream stream) {
  return guarded("HcclAlltoAllV", [&] {
    auto communicator = resolve(comm);
    require_same_type(sendType, recvType);
    const size_t element = element_bytes(sendType);
    const uint32_t ranks = communicator->size();
    return enqueue_all_to_all(HCCL_CMD_ALLTOALLV, "HcclAlltoAllV", sendBuf, recvBuf, sendType,
                              listed_parts(ranks, sendCounts, sdispls, element, "send"),
                              listed_parts(ranks, recvCounts, rdispls, element, "receive"), communicator,
                              stream);
  });
}

HCCL_API HcclResult HcclAlltoAllVC(const void* sendBuf, const void* sendCountMatrix, HcclDataType sendType,
                                   const void* recvBuf, HcclDataType recvType, HcclComm comm,
                                   aclrtStream stream) {
  return guarded("HcclAlltoAllVC", [&] {
    auto communicator = resolve(comm);
    require_same_type(sendType, recvType);
    require_buffer(sendCountMatrix, 1, "sendCountMatrix");
    const auto* matrix = static_cast<const uint64_t*>(sendCountMatrix);
    const size_t element = element_bytes(sendType);
    const uint32_t ranks = communicator->size();
    const uint32_t rank = communicator->rank();
    std::vector<Range> to(ranks);
    std::vector<Range> from(ranks);
    uint64_t sent = 0;
    uint64_t received = 0;
    for (uint32_t peer = 0; peer < ranks; ++peer) {
      to[peer] = {sent, matrix[rank * ranks + peer] * element};
      from[peer] = {received, matrix[peer * ranks + rank] * element};
      sent += to[peer].bytes;
      received += from[peer].bytes;
    }
    return enqueue_all_to_all(HCCL_CMD_ALLTOALLVC, "HcclAlltoAllVC", sendBuf, recvBuf, sendType,
                              std::move(to), std::move(from), communicator, stream);
  });
}

HCCL_API HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
  return guarded("HcclBarrier", [&] {
    auto communicator = resolve(comm);
    auto collective = make_gather(announce(HCCL_CMD_BARRIER, HCCL_DATA_TYPE_INT8, 0), nullptr, nullptr,
                                  communicator->rank(), std::vector<Range>(communicator->size()));
    return enqueue(stream, communicator, std::move(collective), "HcclBarrier");
  });
}
