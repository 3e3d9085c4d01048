// The C entry points of sends, receives and groups.
#include "runtime/hccl/data_type.h"
#include "runtime/hccl/errors.h"
#include "runtime/hccl/handles.h"

#define HCCL_API extern "C" __attribute__((visibility("default")))

namespace host_runtime::hccl {
namespace {

Message checked_message(const Communicator& communicator, bool send, void* buffer, uint64_t count,
                        HcclDataType type, uint32_t peer) {
  require_movable(type);
  if (buffer == nullptr && count > 0) throw Error(HCCL_E_PTR, "the buffer is a null pointer");
  if (peer >= communicator.size()) {
    throw Error(HCCL_E_PARA, std::string(send ? "destRank " : "srcRank ") + std::to_string(peer) +
                                 " is no rank of a communicator of " + std::to_string(communicator.size()));
  }
  return {send, peer, static_cast<std::byte*>(buffer), count * element_bytes(type), type};
}

HcclResult enqueue_message(const char* name, bool send, void* buffer, uint64_t count, HcclDataType type,
                           uint32_t peer, HcclComm comm, aclrtStream stream) {
  return guarded(name, [&] {
    auto communicator = resolve(comm);
    const Message message = checked_message(*communicator, send, buffer, count, type, peer);
    if (peer == communicator->rank()) {
      throw Error(HCCL_E_PARA, "rank " + std::to_string(peer) +
                                   " cannot exchange a single message with itself; " +
                                   "use HcclBatchSendRecv");
    }
    launch_message(stream, communicator, message, name);
    return HCCL_SUCCESS;
  });
}

}  // namespace
}  // namespace host_runtime::hccl

using namespace host_runtime::hccl;

HCCL_API HcclResult HcclSend(void* sendBuf, uint64_t count, HcclDataType dataType, uint32_t destRank,
                             HcclComm comm, aclrtStream stream) {
  return enqueue_message("HcclSend", true, sendBuf, count, dataType, destRank, comm, stream);
}

HCCL_API HcclResult HcclRecv(void* recvBuf, uint64_t count, HcclDataType dataType, uint32_t srcRank,
                             HcclComm comm, aclrtStream stream) {
  return enqueue_message("HcclRecv", false, recvBuf, count, dataType, srcRank, comm, stream);
}

HCCL_API HcclResult HcclBatchSendRecv(HcclSendRecvItem* sendRecvInfo, uint32_t itemNum, HcclComm comm,
                                      aclrtStream stream) {
  return guarded("HcclBatchSendRecv", [&] {
    auto communicator = resolve(comm);
    if (sendRecvInfo == nullptr) throw Error(HCCL_E_PTR, "sendRecvInfo is a null pointer");
    std::vector<Message> messages;
    for (uint32_t i = 0; i < itemNum; ++i) {
      const HcclSendRecvItem& item = sendRecvInfo[i];
      if (item.sendRecvType != HCCL_SEND && item.sendRecvType != HCCL_RECV) {
        throw Error(HCCL_E_PARA, "item " + std::to_string(i) + " is neither HCCL_SEND nor HCCL_RECV");
      }
      messages.push_back(checked_message(*communicator, item.sendRecvType == HCCL_SEND, item.buf, item.count,
                                         item.dataType, item.remoteRank));
    }
    launch(stream, std::make_shared<MessageTask>(communicator, std::move(messages), "HcclBatchSendRecv"));
    return HCCL_SUCCESS;
  });
}

HCCL_API HcclResult HcclGroupStart() {
  group_start();
  return HCCL_SUCCESS;
}

HCCL_API HcclResult HcclGroupEnd() {
  return guarded("HcclGroupEnd", [] {
    group_end();
    return HCCL_SUCCESS;
  });
}
