#include "runtime/hccl/handles.h"

#include <map>
#include <mutex>

#include "runtime/acl/rank_group.h"
#include "runtime/hccl/data_type.h"
#include "runtime/hccl/errors.h"
#include "runtime/hccl/sized_parts.h"

namespace host_runtime::hccl {
namespace {

struct Handles {
  std::mutex mutex;
  std::map<HcclComm, CommunicatorPtr> live;
};

/// Never destroyed: torch_npu destroys communicators while the process exits.
Handles& handles() {
  static auto* all = new Handles;
  return *all;
}

struct Grouped {
  aclrtStream stream;
  TaskPtr task;                  // null for messages
  CommunicatorPtr communicator;  // of the messages
  std::vector<Message> messages;
};

struct Group {
  int depth = 0;
  std::vector<Grouped> work;
};

Group& this_group() {
  static thread_local Group group;
  return group;
}

HcclDataType hccl_type(aclDataType type) {
  switch (type) {
    case ACL_FLOAT:
      return HCCL_DATA_TYPE_FP32;
    case ACL_FLOAT16:
      return HCCL_DATA_TYPE_FP16;
    case ACL_BF16:
      return HCCL_DATA_TYPE_BFP16;
    case ACL_INT8:
      return HCCL_DATA_TYPE_INT8;
    default:
      throw Error(HCCL_E_NOT_SUPPORT, "fused operators send float32, float16, bfloat16 and int8 only");
  }
}

/// A communicator as operators see it.
class CommunicatorGroup final : public RankGroup {
 public:
  explicit CommunicatorGroup(CommunicatorPtr communicator) : communicator_(std::move(communicator)) {}
  uint32_t size() const override { return communicator_->size(); }
  uint32_t rank() const override { return communicator_->rank(); }
  uint64_t buffer_bytes() const override { return communicator_->buffer_bytes(); }
  void keep_for_experts() const override { communicator_->claim(Use::kExperts); }
  Parts exchange(const ExpertExchange& what, const Parts& parts, const char* label) const override {
    Operation announced = announce(HCCL_CMD_INVALID, hccl_type(what.type), what.hidden);
    announced.kind = what.back ? kExpertCombine : kExpertDispatch;
    announced.experts = what.experts;
    announced.tokens = what.tokens;
    SizedParts exchange(announced, communicator_->rank(), parts);
    communicator_->run(exchange, label);
    return std::move(exchange).received();
  }
  std::function<void()> all_reduce_sum(void* buffer, uint64_t count, aclDataType type,
                                       const char* label) const override {
    communicator_->claim(Use::kCollectives);
    Operation announced = announce(HCCL_CMD_ALLREDUCE, hccl_type(type), count);
    announced.reduction = HCCL_REDUCE_SUM;
    std::shared_ptr<Collective> collective = make_reduce(announced, buffer, buffer);
    return [communicator = communicator_, collective, label] { communicator->run(*collective, label); };
  }

 private:
  CommunicatorPtr communicator_;
};

void hand_over(aclrtStream stream, TaskPtr task) {
  const std::string name = task->name();
  const aclError code = submit(stream, std::move(task));
  if (code == ACL_SUCCESS) return;
  const char* why = aclGetRecentErrMsg();
  throw Error(HCCL_E_RUNTIME, "the stream does not take " + name + " (error " + std::to_string(code) +
                                  "): " + (why == nullptr ? "" : why));
}

}  // namespace

HcclResult refuse(HcclResult code, const std::string& message) {
  fail(ACL_ERROR_RT_INTERNAL_ERROR, message);
  return code;
}

HcclComm publish(CommunicatorPtr communicator) {
  const std::lock_guard<std::mutex> guard(handles().mutex);
  const HcclComm handle = communicator.get();
  publish_group(communicator->name(), std::make_shared<CommunicatorGroup>(communicator));
  handles().live.emplace(handle, std::move(communicator));
  return handle;
}

CommunicatorPtr resolve(HcclComm handle) {
  if (handle == nullptr) throw Error(HCCL_E_PTR, "the communicator is a null pointer");
  const std::lock_guard<std::mutex> guard(handles().mutex);
  const auto found = handles().live.find(handle);
  if (found == handles().live.end()) {
    throw Error(HCCL_E_PARA, "the communicator does not exist (never created, or already destroyed)");
  }
  return found->second;
}

void withdraw(HcclComm handle) {
  const CommunicatorPtr communicator = resolve(handle);
  withdraw_group(communicator->name());
  const std::lock_guard<std::mutex> guard(handles().mutex);
  handles().live.erase(handle);
}

void launch(aclrtStream stream, TaskPtr task) {
  if (stream == nullptr) throw Error(HCCL_E_PTR, "the stream is a null pointer");
  Group& group = this_group();
  if (group.depth == 0) return hand_over(stream, std::move(task));
  group.work.push_back({stream, std::move(task), nullptr, {}});
}

void launch_message(aclrtStream stream, CommunicatorPtr communicator, const Message& message,
                    const char* name) {
  if (stream == nullptr) throw Error(HCCL_E_PTR, "the stream is a null pointer");
  Group& group = this_group();
  if (group.depth == 0) {
    return hand_over(
        stream, std::make_shared<MessageTask>(std::move(communicator), std::vector<Message>{message}, name));
  }
  for (Grouped& grouped : group.work) {
    if (grouped.stream == stream && grouped.communicator == communicator) {
      grouped.messages.push_back(message);
      return;
    }
  }
  group.work.push_back({stream, nullptr, std::move(communicator), {message}});
}

void group_start() { ++this_group().depth; }

void group_end() {
  Group& group = this_group();
  if (group.depth == 0)
    throw Error(HCCL_E_PARA, "no group is open on this thread; call HcclGroupStart first");
  if (--group.depth > 0) return;
  std::vector<Grouped> work;
  work.swap(group.work);
  for (Grouped& grouped : work) {
    TaskPtr task = std::move(grouped.task);
    if (task == nullptr) {
      task = std::make_shared<MessageTask>(std::move(grouped.communicator), std::move(grouped.messages),
                                           "HcclGroup");
    }
    hand_over(grouped.stream, std::move(task));
  }
}

}  // namespace host_runtime::hccl
