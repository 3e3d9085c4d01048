// Sends and receives over the lanes of a communicator.
#include <algorithm>
#include <cstring>

#include "runtime/hccl/communicator.h"
#include "runtime/hccl/data_type.h"
#include "runtime/hccl/errors.h"

namespace host_runtime::hccl {

/// How far one message has come. `next` is the number of the message's next chunk in its lane.
struct Communicator::Progress {
  Message message;
  Lane* lane;
  Progress* before = nullptr;  // the earlier message of this batch in the same lane
  bool started = false;
  uint64_t next = 0;
  uint64_t moved = 0;
  bool copied = false;  // send: everything lies in the lane, but the receiver has not taken all of it
  bool done = false;
};

bool Communicator::advance_send(Progress& progress) {
  Lane& lane = *progress.lane;
  const Message& message = progress.message;
  bool moved = false;
  while (!progress.copied && progress.next < lane.taken.load(std::memory_order_acquire) + 2) {
    const uint64_t bytes = std::min<uint64_t>(kLaneBytes, message.bytes - progress.moved);
    lane.chunks[progress.next & 1] = {message.bytes, static_cast<uint32_t>(message.type),
                                      static_cast<uint32_t>(bytes)};
    std::memcpy(lane.data[progress.next & 1], message.buffer + progress.moved, bytes);
    progress.moved += bytes;
    lane.sent.store(++progress.next, std::memory_order_release);
    segment_.ring(message.peer);
    moved = true;
    progress.copied = progress.moved == message.bytes;
  }
  if (progress.copied && !progress.done && lane.taken.load(std::memory_order_acquire) >= progress.next) {
    progress.done = moved = true;
  }
  return moved;
}

bool Communicator::advance_receive(Progress& progress, const char* label) {
  Lane& lane = *progress.lane;
  const Message& message = progress.message;
  bool moved = false;
  while (!progress.done && progress.next < lane.sent.load(std::memory_order_acquire)) {
    const Lane::Chunk chunk = lane.chunks[progress.next & 1];
    if (chunk.message_bytes != message.bytes || chunk.data_type != static_cast<uint32_t>(message.type)) {
      fail(ACL_ERROR_RT_FFTS_PLUS_EXCEPTION, HCCL_E_PARA,
           std::string(label) + ": " + segment_.describe(message.peer) + " sends " +
               std::to_string(chunk.message_bytes) + " bytes of " + data_type_name(chunk.data_type) + " to " +
               segment_.describe(rank()) + ", which expects " + std::to_string(message.bytes) + " bytes of " +
               data_type_name(message.type) + ". Both ends must name the same count and data type");
    }
    std::memcpy(message.buffer + progress.moved, lane.data[progress.next & 1], chunk.bytes);
    progress.moved += chunk.bytes;
    lane.taken.store(++progress.next, std::memory_order_release);
    segment_.ring(message.peer);
    moved = true;
    progress.done = progress.moved == message.bytes;
  }
  return moved;
}

bool Communicator::advance(Progress& progress, const char* label) {
  if (progress.done) return false;
  if (!progress.started) {
    // Messages of one lane keep their order: the one before must have left (or come) completely.
    if (progress.before != nullptr && !progress.before->copied && !progress.before->done) return false;
    progress.next = progress.message.send ? progress.lane->sent.load() : progress.lane->taken.load();
    progress.started = true;
  }
  return progress.message.send ? advance_send(progress) : advance_receive(progress, label);
}

void Communicator::transfer(const std::vector<Message>& messages, const char* label) {
  const std::lock_guard<std::mutex> one_at_a_time(lanes_);
  throw_if_failed();
  std::vector<Progress> all(messages.size());
  for (size_t i = 0; i < messages.size(); ++i) {
    const Message& message = messages[i];
    all[i].message = message;
    all[i].lane = message.send ? &segment_.lane(rank(), message.peer) : &segment_.lane(message.peer, rank());
    for (size_t j = i; j-- > 0 && all[i].before == nullptr;) {
      if (all[j].lane == all[i].lane && messages[j].send == message.send) all[i].before = &all[j];
    }
  }
  bool moved = false;
  auto advance_all = [&] {
    for (Progress& progress : all) moved |= advance(progress, label);
    return moved;
  };
  auto finished = [&] {
    return std::all_of(all.begin(), all.end(), [](const Progress& p) { return p.done; });
  };
  auto missing = [&] {
    std::vector<uint32_t> peers;
    for (const Progress& progress : all) {
      if (!progress.done) peers.push_back(progress.message.peer);
    }
    return peers;
  };
  try {
    while (!finished()) {
      moved = false;
      segment_.wait(advance_all, missing, exec_timeout_);
    }
  } catch (const WaitFailure& failure) {
    fail_wait(failure, label);
  }
}

}  // namespace host_runtime::hccl
