// Capture and replay through the C interface.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/runtime/native/check.h"

namespace {

struct Streams {
  Streams() {
    for (auto& stream : all) CHECK_OK(aclrtCreateStream(&stream));
  }
  ~Streams() {
    for (auto& stream : all) CHECK_OK(aclrtDestroyStream(stream));
  }
  aclrtStream all[3];
};

struct Event {
  Event() { CHECK_OK(aclrtCreateEventExWithFlag(&handle, ACL_EVENT_SYNC)); }
  ~Event() { CHECK_OK(aclrtDestroyEvent(handle)); }
  aclrtEvent handle = nullptr;
};

aclmdlRI end_capture(aclrtStream stream) {
  aclmdlRI graph = nullptr;
  CHECK_OK(aclmdlRICaptureEnd(stream, &graph));
  return graph;
}

void captures_and_replays() {
  Streams streams;
  aclrtStream stream = streams.all[0];
  int value = 0;
  CHECK_OK(aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  aclmdlRICaptureStatus status{};
  aclmdlRI during = nullptr;
  CHECK_OK(aclmdlRICaptureGetInfo(stream, &status, &during));
  CHECK(status == ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE && during != nullptr);
  for (int i = 0; i < 10; ++i) CHECK_OK(launch(stream, [&] { ++value; }));
  CHECK_CODE(aclmdlRIExecuteAsync(during, streams.all[1]), ACL_ERROR_RT_MODEL_CAPTURED);
  aclmdlRI graph = end_capture(stream);
  CHECK(graph == during);
  CHECK(value == 0);
  const uint64_t nodes = counter("graph_nodes");
  for (int i = 0; i < 100; ++i) CHECK_OK(aclmdlRIExecuteAsync(graph, streams.all[i % 2]));
  CHECK_OK(aclrtSynchronizeDevice());
  CHECK(value == 1000);
  CHECK(counter("graph_nodes") - nodes == 1000);
  CHECK_OK(aclmdlRIExecute(graph, -1));
  CHECK(value == 1010);
  CHECK_OK(aclmdlRISetName(graph, "decode"));
  char name[16];
  CHECK_OK(aclmdlRIGetName(graph, sizeof name, name));
  CHECK(std::string(name) == "decode");
  int destroyed = 0;
  CHECK_OK(aclmdlRIDestroyRegisterCallback(graph, [](void* d) { ++*static_cast<int*>(d); }, &destroyed));
  CHECK_OK(aclmdlRIDestroy(graph));
  CHECK(destroyed == 1);
  CHECK_CODE(aclmdlRIExecuteAsync(graph, stream), ACL_ERROR_RT_INVALID_HANDLE);
}

/// Fork and join: origin -> two side streams -> origin.
void several_streams() {
  Streams streams;
  auto [origin, left, right] = streams.all;
  Event fork;
  Event left_done;
  Event right_done;
  std::mutex mutex;
  std::vector<int> order;
  const auto note = [&](int number) {
    std::lock_guard lock(mutex);
    order.push_back(number);
  };
  const auto either_way = [&](std::vector<int> wanted) {
    if (order[1] == 3) std::swap(wanted[1], wanted[2]);  // the side streams run side by side
    return order == wanted;
  };
  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  CHECK_OK(launch(origin, [&] { note(1); }));
  CHECK_OK(aclrtRecordEvent(fork.handle, origin));
  CHECK_OK(aclrtStreamWaitEvent(left, fork.handle));
  CHECK_OK(aclrtStreamWaitEvent(right, fork.handle));
  CHECK_OK(launch(left, [&] { note(2); }));
  CHECK_OK(launch(right, [&] { note(3); }));
  CHECK_OK(aclrtRecordEvent(right_done.handle, right));
  // The right stream comes back by way of the left one.
  CHECK_OK(aclrtStreamWaitEvent(left, right_done.handle));
  CHECK_OK(aclrtRecordEvent(left_done.handle, left));
  CHECK_OK(aclrtStreamWaitEvent(origin, left_done.handle));
  CHECK_OK(launch(origin, [&] { note(4); }));
  aclrtEventRecordedStatus recorded{};
  CHECK_CODE(aclrtQueryEventStatus(fork.handle, &recorded), ACL_ERROR_RT_EVENT_CAPTURED);
  CHECK_CODE(aclrtSynchronizeEvent(fork.handle), ACL_ERROR_RT_EVENT_CAPTURED);
  aclmdlRICaptureStatus status{};
  CHECK_OK(aclmdlRICaptureGetInfo(left, &status, nullptr));
  CHECK(status == ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE);
  CHECK_CODE(aclrtDestroyStream(left), ACL_ERROR_RT_STREAM_CAPTURED);
  aclmdlRI wrong = nullptr;
  CHECK_CODE(aclmdlRICaptureEnd(left, &wrong), ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED);
  aclmdlRI graph = end_capture(origin);
  CHECK_OK(aclmdlRICaptureGetInfo(left, &status, nullptr));
  CHECK(status == ACL_MODEL_RI_CAPTURE_STATUS_NONE);
  CHECK_OK(aclmdlRIExecuteAsync(graph, right));
  CHECK_OK(aclrtSynchronizeStream(right));
  CHECK(either_way({1, 2, 3, 4}));

  uint32_t number = 0;
  CHECK_OK(aclmdlRIGetStreams(graph, nullptr, &number));
  CHECK(number == 3);
  aclrtStream inside[3];
  CHECK_OK(aclmdlRIGetStreams(graph, inside, &number));
  uint32_t tasks = 2;
  aclmdlRITask handles[8];
  CHECK_CODE(aclmdlRIGetTasksByStream(inside[0], handles, &tasks), ACL_ERROR_RT_INSUFFICIENT_INPUT_ARRAY);
  tasks = 8;
  CHECK_OK(aclmdlRIGetTasksByStream(inside[0], handles, &tasks));
  CHECK(tasks == 4);
  aclmdlRITaskType type{};
  CHECK_OK(aclmdlRITaskGetType(handles[0], &type));
  CHECK(type == ACL_MODEL_RI_TASK_KERNEL);
  CHECK_OK(aclmdlRITaskGetType(handles[1], &type));
  CHECK(type == ACL_MODEL_RI_TASK_EVENT_RECORD);
  CHECK_OK(aclmdlRITaskDisable(handles[3]));
  CHECK_OK(aclmdlRIUpdate(graph));
  order.clear();
  CHECK_OK(aclmdlRIExecute(graph, -1));
  CHECK(either_way({1, 2, 3}));
  CHECK_OK(aclmdlRIDestroy(graph));
  CHECK_CODE(aclmdlRITaskGetType(handles[0], &type), ACL_ERROR_RT_INVALID_HANDLE);
}

void refusals() {
  Streams streams;
  auto [origin, side, other] = streams.all;
  Event event;
  CHECK_CODE(aclmdlRICaptureBegin(nullptr, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL),
             ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT);
  aclmdlRI graph = nullptr;
  CHECK_CODE(aclmdlRICaptureEnd(origin, &graph), ACL_ERROR_RT_STREAM_NOT_CAPTURED);
  void* memory = nullptr;
  void* pinned = nullptr;
  CHECK_OK(aclrtMalloc(&memory, 4096, ACL_MEM_MALLOC_HUGE_FIRST));
  CHECK_OK(aclrtMallocHost(&pinned, 4096));
  std::vector<char> pageable(4096);

  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  CHECK_CODE(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL), ACL_ERROR_RT_STREAM_CAPTURED);
  CHECK_CODE(aclrtSynchronizeStream(origin), ACL_ERROR_RT_STREAM_CAPTURED);
  aclrtStreamStatus status{};
  CHECK_CODE(aclrtStreamQuery(origin, &status), ACL_ERROR_RT_STREAM_CAPTURED);
  CHECK_CODE(aclrtSynchronizeDevice(), ACL_ERROR_RT_STREAM_CAPTURED);
  CHECK_CODE(aclrtMemcpy(memory, 4096, pinned, 4096, ACL_MEMCPY_HOST_TO_DEVICE),
             ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
  CHECK_CODE(aclrtMemset(memory, 4096, 0, 4096), ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
  CHECK_CODE(aclrtMemcpyAsync(memory, 4096, pageable.data(), 4096, ACL_MEMCPY_HOST_TO_DEVICE, other),
             ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC);
  CHECK_CODE(aclrtMemcpyAsync(memory, 4096, pageable.data(), 4096, ACL_MEMCPY_HOST_TO_DEVICE, origin),
             ACL_ERROR_RT_PARAM_INVALID);
  CHECK_OK(aclrtMemcpyAsync(memory, 4096, pinned, 4096, ACL_MEMCPY_HOST_TO_DEVICE, origin));
  aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_RELAXED;
  CHECK_OK(aclmdlRICaptureThreadExchangeMode(&mode));
  CHECK(mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL);
  CHECK_OK(aclrtMemset(memory, 4096, 0, 4096));
  CHECK_OK(aclmdlRICaptureThreadExchangeMode(&mode));
  std::thread([&] {
    CHECK_OK(aclrtSetDevice(0));
    CHECK_CODE(aclrtMemset(memory, 4096, 0, 4096), ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
    aclmdlRI ended = nullptr;
    CHECK_CODE(aclmdlRICaptureEnd(origin, &ended), ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD);
  }).join();

  // In the thread-local mode other threads are free.
  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL));
  CHECK_CODE(aclrtMemset(memory, 4096, 0, 4096), ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
  std::thread([&] {
    CHECK_OK(aclrtSetDevice(0));
    CHECK_OK(aclrtMemset(memory, 4096, 0, 4096));
  }).join();
  CHECK_OK(aclmdlRIDestroy(end_capture(origin)));

  // A side stream that does not come back.
  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  CHECK_OK(aclrtRecordEvent(event.handle, origin));
  CHECK_OK(aclrtStreamWaitEvent(side, event.handle));
  CHECK_OK(launch(side, [] {}, "aclnnLost"));
  CHECK_CODE(aclmdlRICaptureEnd(origin, &graph), ACL_ERROR_RT_STREAM_UNJOINED);
  CHECK(message_has("aclnnLost"));
  // The streams are free again.
  CHECK_OK(launch(side, [] {}));
  CHECK_OK(aclrtSynchronizeStream(side));

  // An event from outside; the default stream; a stream of another capture.
  CHECK_OK(aclrtRecordEvent(event.handle, other));
  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  CHECK_CODE(aclrtStreamWaitEvent(origin, event.handle), ACL_ERROR_RT_CAPTURE_DEPENDENCY);
  CHECK_CODE(launch(origin, [] {}), ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED);
  CHECK_CODE(aclmdlRICaptureEnd(origin, &graph), ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED);
  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  CHECK_OK(aclrtRecordEvent(event.handle, origin));
  CHECK_CODE(aclrtStreamWaitEvent(nullptr, event.handle), ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT);
  CHECK_CODE(aclmdlRICaptureEnd(origin, &graph), ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED);
  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_RELAXED));
  CHECK_OK(aclmdlRICaptureBegin(side, ACL_MODEL_RI_CAPTURE_MODE_RELAXED));
  CHECK_OK(aclrtRecordEvent(event.handle, origin));
  CHECK_CODE(aclrtStreamWaitEvent(side, event.handle), ACL_ERROR_STREAM_CAPTURE_CONFLICT);
  CHECK_CODE(aclmdlRICaptureEnd(origin, &graph), ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED);
  CHECK_CODE(aclmdlRICaptureEnd(side, &graph), ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED);
  CHECK_OK(aclrtFree(memory));
  CHECK_OK(aclrtFreeHost(pinned));
}

aclmdlRI capture_with_group(aclrtStream stream, std::atomic<int>& value, int first, aclrtTaskGrp* group,
                            void* gate) {
  CHECK_OK(aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  if (gate != nullptr) {
    CHECK_OK(aclrtValueWait(gate, 1, ACL_STREAM_WAIT_VALUE_EQ, stream));
    CHECK_OK(aclrtValueWrite(gate, 0, 0, stream));
  }
  CHECK_OK(aclmdlRICaptureTaskGrpBegin(stream));
  CHECK_OK(launch(stream, [&value, first] { value = first; }));
  CHECK_OK(aclmdlRICaptureTaskGrpEnd(stream, group));
  CHECK_OK(launch(stream, [&value] { value += 100; }));
  return end_capture(stream);
}

void task_groups() {
  Streams streams;
  auto [stream, update, unused] = streams.all;
  std::atomic<int> value{0};
  aclrtTaskGrp group = nullptr;
  aclmdlRI graph = capture_with_group(stream, value, 1, &group, nullptr);
  CHECK_OK(aclmdlRIExecuteAsync(graph, stream));
  CHECK_OK(aclrtSynchronizeStream(stream));
  CHECK(value == 101);
  for (int i = 2; i < 50; ++i) {
    CHECK_OK(aclmdlRICaptureTaskUpdateBegin(stream, group));
    CHECK_OK(launch(stream, [&value, i] { value = i; }));
    CHECK_OK(aclmdlRICaptureTaskUpdateEnd(stream));
    CHECK_OK(aclmdlRIExecuteAsync(graph, stream));
    CHECK_OK(launch(stream, [&value, i] { CHECK(value == 100 + i); }));
  }
  CHECK_OK(aclrtSynchronizeStream(stream));
  CHECK(value == 149);
  // Too few tasks, too many, no operator: the graph stays as it was.
  CHECK_OK(aclmdlRICaptureTaskUpdateBegin(update, group));
  CHECK_CODE(aclmdlRICaptureTaskUpdateBegin(update, group), ACL_ERROR_STREAM_TASK_GROUP_STATUS);
  CHECK_CODE(aclmdlRICaptureTaskUpdateEnd(update), ACL_ERROR_RT_INTERNAL_ERROR);
  CHECK(message_has("0 tasks and the task group 1"));
  CHECK_OK(aclmdlRICaptureTaskUpdateBegin(update, group));
  CHECK_OK(launch(update, [] {}));
  CHECK_CODE(launch(update, [] {}), ACL_ERROR_RT_INTERNAL_ERROR);
  CHECK_CODE(aclmdlRICaptureTaskUpdateEnd(update), ACL_ERROR_RT_INTERNAL_ERROR);
  CHECK_OK(aclmdlRICaptureTaskUpdateBegin(update, group));
  CHECK_CODE(launch(update, [] {}, "aclrtSomethingElse"), ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT);
  CHECK_CODE(aclmdlRICaptureTaskUpdateEnd(update), ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT);
  CHECK_CODE(aclmdlRICaptureTaskUpdateEnd(update), ACL_ERROR_STREAM_TASK_GROUP_STATUS);
  CHECK_OK(aclmdlRIExecute(graph, -1));
  CHECK(value == 149);
  CHECK_OK(aclmdlRIDestroy(graph));
  CHECK_CODE(aclmdlRICaptureTaskUpdateBegin(update, group), ACL_ERROR_RT_INVALID_HANDLE);
}

/// The update runs on a stream of its own while the replay waits for it (torch_npu's ExternalEvent).
void updates_while_running() {
  Streams streams;
  auto [stream, update, unused] = streams.all;
  void* gate = nullptr;
  CHECK_OK(aclrtMallocAlign32(&gate, 32, ACL_MEM_MALLOC_NORMAL_ONLY));
  CHECK_OK(aclrtMemset(gate, 32, 0, 32));
  std::atomic<int> value{0};
  aclrtTaskGrp group = nullptr;
  aclmdlRI graph = capture_with_group(stream, value, 1, &group, gate);
  for (int i = 0; i < 200; ++i) {
    CHECK_OK(aclmdlRIExecuteAsync(graph, stream));
    CHECK_OK(aclmdlRICaptureTaskUpdateBegin(update, group));
    CHECK_OK(launch(update, [&value, i] { value = i; }));
    CHECK_OK(aclmdlRICaptureTaskUpdateEnd(update));
    CHECK_OK(aclrtValueWrite(gate, 1, 0, update));
    CHECK_OK(aclrtSynchronizeStream(stream));
    CHECK(value == 100 + i);
  }
  // A failed update stream must not leave the replay waiting, nor let it use stale arguments in silence.
  CHECK_OK(aclrtSetStreamFailureMode(update, ACL_STOP_ON_FAILURE));
  CHECK_OK(aclmdlRIExecuteAsync(graph, stream));
  CHECK_OK(launch(update, [] { throw std::runtime_error("no lengths"); }, "aclnnLengths"));
  aclrtValueWrite(gate, 1, 0, update);
  CHECK_CODE(aclrtSynchronizeStream(stream), ACL_ERROR_RT_AICORE_EXCEPTION);
  CHECK(message_has("aclnnLengths"));
  CHECK_OK(aclmdlRIDestroy(graph));
  CHECK_OK(aclrtFree(gate));
}

/// A wait in front of the write that it waits for, on two streams of one graph: order of capture alone would
/// hang.
void waits_inside_a_graph() {
  Streams streams;
  auto [origin, side, unused] = streams.all;
  Event fork;
  Event join;
  void* gate = nullptr;
  CHECK_OK(aclrtMallocAlign32(&gate, 32, ACL_MEM_MALLOC_NORMAL_ONLY));
  CHECK_OK(aclrtMemset(gate, 32, 0, 32));
  std::vector<int> order;
  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  CHECK_OK(aclrtRecordEvent(fork.handle, origin));
  CHECK_OK(aclrtStreamWaitEvent(side, fork.handle));
  CHECK_OK(aclrtValueWait(gate, 1, ACL_STREAM_WAIT_VALUE_GEQ, origin));
  CHECK_OK(launch(origin, [&] { order.push_back(2); }));
  CHECK_OK(launch(side, [&] { order.push_back(1); }));
  CHECK_OK(aclrtValueWrite(gate, 1, 0, side));
  CHECK_OK(aclrtRecordEvent(join.handle, side));
  CHECK_OK(aclrtStreamWaitEvent(origin, join.handle));
  CHECK_OK(aclrtValueWrite(gate, 0, 0, origin));
  aclmdlRI graph = end_capture(origin);
  for (int i = 0; i < 20; ++i) {
    order.clear();
    CHECK_OK(aclmdlRIExecuteAsync(graph, origin));
    CHECK_OK(aclrtSynchronizeStreamWithTimeout(origin, 10000));
    CHECK((order == std::vector<int>{1, 2}));
  }
  CHECK_OK(aclmdlRIDestroy(graph));
  CHECK_OK(aclrtFree(gate));
}

/// Captures `rounds` times: a task on each of two streams, which may run side by side, and a join of the two.
aclmdlRI capture_pairs(aclrtStream origin, aclrtStream side, int rounds, const std::function<void()>& here,
                       const std::function<void()>& there) {
  std::vector<Event> forks(rounds);
  std::vector<Event> joins(rounds);
  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  for (int i = 0; i < rounds; ++i) {
    CHECK_OK(aclrtRecordEvent(forks[i].handle, origin));
    CHECK_OK(aclrtStreamWaitEvent(side, forks[i].handle));
    CHECK_OK(launch(origin, here, "aclnnHere"));
    CHECK_OK(launch(side, there, "aclnnThere"));
    CHECK_OK(aclrtRecordEvent(joins[i].handle, side));
    CHECK_OK(aclrtStreamWaitEvent(origin, joins[i].handle));
  }
  return end_capture(origin);
}

/// Each of two tasks ends when the other one has begun.
void streams_run_side_by_side() {
  if (std::thread::hardware_concurrency() < 2) return;
  Streams streams;
  auto [origin, side, other] = streams.all;
  std::atomic<int> begun{0};
  std::atomic<int> late{0};
  const auto meet = [&] {
    const int round = begun.fetch_add(1) / 2;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (begun.load() < 2 * (round + 1)) {
      if (std::chrono::steady_clock::now() > end) {
        late.fetch_add(1);
        return;
      }
      std::this_thread::yield();
    }
  };
  std::atomic<int> alone{0};
  const auto meet_beside = [&] {
    meet();
    if (!host_runtime::runs_beside_others()) alone.fetch_add(1);
    meet();  // before that none leaves
  };
  CHECK(!host_runtime::runs_beside_others());
  aclmdlRI graph = capture_pairs(origin, side, 5, meet_beside, meet_beside);
  for (int i = 0; i < 20 && late == 0; ++i) {
    CHECK_OK(aclmdlRIExecuteAsync(graph, i % 2 == 0 ? origin : other));
    CHECK_OK(aclrtSynchronizeDevice());
  }
  CHECK(late == 0 && alone == 0 && begun == 20 * 5 * 4);
  CHECK_OK(aclmdlRIDestroy(graph));
}

/// Events order what they are between, however the streams' threads are scheduled.
void events_order_streams_of_a_graph() {
  Streams streams;
  auto [origin, side, other] = streams.all;
  constexpr int kRounds = 50;
  int here = 0;  // written by one stream, read by the other behind the join
  int there = 0;
  bool equal = true;
  std::vector<Event> events(2 * kRounds);
  CHECK_OK(aclmdlRICaptureBegin(origin, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  for (int i = 0; i < kRounds; ++i) {
    CHECK_OK(launch(origin, [&] { ++here; }));
    CHECK_OK(aclrtRecordEvent(events[2 * i].handle, origin));
    CHECK_OK(aclrtStreamWaitEvent(side, events[2 * i].handle));
    CHECK_OK(launch(side, [&] {
      equal = equal && here == there + 1;
      ++there;
    }));
    CHECK_OK(aclrtRecordEvent(events[2 * i + 1].handle, side));
    CHECK_OK(aclrtStreamWaitEvent(origin, events[2 * i + 1].handle));
  }
  aclmdlRI graph = end_capture(origin);
  for (int i = 0; i < 100; ++i) CHECK_OK(aclmdlRIExecuteAsync(graph, other));
  CHECK_OK(aclrtSynchronizeStream(other));
  CHECK(equal && here == 100 * kRounds && there == here);
  CHECK_OK(aclmdlRIDestroy(graph));
}

/// The other stream's tasks that have not begun are not run, and the next replay is a whole one.
void failing_node_of_a_side_stream() {
  Streams streams;
  auto [origin, side, other] = streams.all;
  std::atomic<bool> fails{true};
  std::atomic<int> ran{0};
  aclmdlRI graph = capture_pairs(
      origin, side, 3, [&] { ran.fetch_add(1); },
      [&] {
        if (fails) throw std::runtime_error("index 7 is out of range");
        ran.fetch_add(1);
      });
  CHECK_OK(aclmdlRIExecuteAsync(graph, other));
  CHECK_CODE(aclrtSynchronizeStream(other), ACL_ERROR_RT_AICORE_EXCEPTION);
  CHECK(message_has("node 3 (aclnnThere)"));
  CHECK(ran <= 1);
  fails = false;
  ran = 0;
  CHECK_OK(aclmdlRIExecuteAsync(graph, origin));
  CHECK_OK(aclrtSynchronizeStream(origin));
  CHECK(ran == 6);
  CHECK_OK(aclmdlRIDestroy(graph));
}

void failing_node_is_named() {
  Streams streams;
  aclrtStream stream = streams.all[0];
  CHECK_OK(aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  CHECK_OK(launch(stream, [] {}));
  CHECK_OK(launch(stream, [] { throw std::runtime_error("index 7 is out of range"); }, "aclnnGather"));
  aclmdlRI graph = end_capture(stream);
  CHECK_OK(aclmdlRIExecuteAsync(graph, streams.all[1]));
  CHECK_CODE(aclrtSynchronizeStream(streams.all[1]), ACL_ERROR_RT_AICORE_EXCEPTION);
  CHECK(message_has("node 1 (aclnnGather)"));
  CHECK_OK(aclmdlRIDestroy(graph));
}

void debug_print() {
  Streams streams;
  aclrtStream stream = streams.all[0];
  CHECK_OK(aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  CHECK_OK(launch(stream, [] {}, "aclnnMatmul"));
  aclmdlRI graph = end_capture(stream);
  CHECK_CODE(aclmdlRIDebugJsonPrint(graph, "/nowhere/graph.json", 0), ACL_ERROR_INVALID_PARAM);
  const std::string path = "/tmp/host_runtime_graph_" +
                           std::to_string(std::hash<std::thread::id>{}(std::this_thread::get_id())) + ".json";
  CHECK_OK(aclmdlRIDebugJsonPrint(graph, path.c_str(), ACL_MDLRI_DEBUG_JSON_PRINT_VERBOSE));
  std::ifstream file(path);
  std::string text((std::istreambuf_iterator<char>(file)), {});
  CHECK(text.find("\"name\": \"aclnnMatmul\"") != std::string::npos);
  CHECK(text.find("\"Task Type\": \"KERNEL\"") != std::string::npos);
  std::remove(path.c_str());
  CHECK_OK(aclmdlRIDestroy(graph));
}

void streams_are_budgeted() {
  Streams streams;
  aclrtStream stream = streams.all[0];
  uint32_t available = 0;
  CHECK_OK(aclrtGetStreamAvailableNum(&available));
  std::vector<aclmdlRI> graphs;
  for (uint32_t i = 0; i < available; ++i) {
    CHECK_OK(aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
    CHECK_OK(launch(stream, [] {}));
    graphs.push_back(end_capture(stream));
  }
  CHECK_CODE(aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL), ACL_ERROR_RT_NO_STREAM_RESOURCE);
  aclrtStream another = nullptr;
  CHECK_CODE(aclrtCreateStream(&another), ACL_ERROR_RT_NO_STREAM_RESOURCE);
  CHECK_OK(aclmdlRIDestroy(graphs.back()));
  graphs.pop_back();
  CHECK_OK(aclrtCreateStream(&another));
  CHECK_OK(aclrtDestroyStream(another));
  for (aclmdlRI graph : graphs) CHECK_OK(aclmdlRIDestroy(graph));
}

}  // namespace

extern const TestCase kGraphTests[] = {
    {"captures_and_replays", captures_and_replays},
    {"several_streams", several_streams},
    {"refusals", refusals},
    {"task_groups", task_groups},
    {"updates_while_running", updates_while_running},
    {"waits_inside_a_graph", waits_inside_a_graph},
    {"streams_run_side_by_side", streams_run_side_by_side},
    {"events_order_streams_of_a_graph", events_order_streams_of_a_graph},
    {"failing_node_of_a_side_stream", failing_node_of_a_side_stream},
    {"failing_node_is_named", failing_node_is_named},
    {"debug_print", debug_print},
    {"streams_are_budgeted", streams_are_budgeted},
    {nullptr, nullptr},
};
