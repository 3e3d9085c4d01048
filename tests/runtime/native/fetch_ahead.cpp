// Weights that the thread of a stream fetches between two replays of a graph.
#include <unistd.h>

#include <chrono>
#include <thread>
#include <vector>

#include "tests/runtime/native/check.h"

namespace {

using host_runtime::MemoryAccess;

constexpr size_t kBytes = 64 << 10;
const bool kCacheKnown = sysconf(_SC_LEVEL2_CACHE_SIZE) > 0;

aclError launch_with(aclrtStream stream, std::vector<MemoryAccess> accesses) {
  return host_runtime::submit(stream, std::make_shared<Operator>([] {}, "aclnnTest", std::move(accesses)));
}

struct Weight {
  MemoryAccess whole() const { return {bytes.data(), bytes.size(), MemoryAccess::Mode::kRead, true}; }
  MemoryAccess read() const { return {bytes.data(), bytes.size(), MemoryAccess::Mode::kRead}; }
  MemoryAccess write() const { return {bytes.data(), 1, MemoryAccess::Mode::kWrite}; }
  std::vector<char> bytes = std::vector<char>(kBytes);
};

class Graph {
 public:
  /// One node for each of the lists.
  Graph(aclrtStream stream, const std::vector<std::vector<MemoryAccess>>& nodes) : stream_(stream) {
    CHECK_OK(aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
    for (const auto& accesses : nodes) CHECK_OK(launch_with(stream, accesses));
    CHECK_OK(aclmdlRICaptureEnd(stream, &handle_));
  }
  ~Graph() { CHECK_OK(aclmdlRIDestroy(handle_)); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  /// Bytes fetched behind `times` replays, one at a time. With a deadline the stream's thread runs them.
  uint64_t fetched_behind(int times) const {
    const uint64_t before = counter("bytes_fetched_ahead");
    for (int i = 0; i < times; ++i) {
      CHECK_OK(aclmdlRIExecuteAsync(handle_, stream_));
      CHECK_OK(aclrtSynchronizeStreamWithTimeout(stream_, 60000));
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    return counter("bytes_fetched_ahead") - before;
  }

 private:
  aclrtStream stream_;
  aclmdlRI handle_ = nullptr;
};

struct Stream {
  Stream() { CHECK_OK(aclrtCreateStream(&handle)); }
  ~Stream() { CHECK_OK(aclrtDestroyStream(handle)); }
  aclrtStream handle = nullptr;
};

void weights_of_a_graph_in_a_loop_are_fetched() {
  const Stream stream;
  const Weight first, second;
  const Graph graph(stream.handle, {{first.whole()}, {}, {second.whole()}, {first.whole()}});
  // The first replay says nothing yet about the next one.
  CHECK(graph.fetched_behind(1) == 0);
  CHECK(graph.fetched_behind(1) == (kCacheKnown ? 2 * kBytes : 0));
  CHECK(graph.fetched_behind(3) == (kCacheKnown ? 6 * kBytes : 0));
}

void graphs_in_turn_are_not_fetched() {
  const Stream stream;
  const Weight weight;
  const Graph one(stream.handle, {{weight.whole()}}), other(stream.handle, {{weight.whole()}});
  for (int i = 0; i < 3; ++i) CHECK(one.fetched_behind(1) + other.fetched_behind(1) == 0);
}

void what_is_written_or_read_in_part_is_not_fetched() {
  const Stream stream;
  const Weight written, looked_up;
  const Graph graph(stream.handle, {{written.write()}, {written.whole()}, {looked_up.read()}});
  CHECK(graph.fetched_behind(3) == 0);
}

void no_more_than_the_cache_holds_is_fetched() {
  if (!kCacheKnown) return;
  const Stream stream;
  Weight weight;
  weight.bytes.resize(static_cast<size_t>(sysconf(_SC_LEVEL2_CACHE_SIZE)) * 2);
  const Graph graph(stream.handle, {{weight.whole()}});
  const uint64_t fetched = graph.fetched_behind(2);
  CHECK(fetched > 0 && fetched < weight.bytes.size() / 2);
}

/// What a kernel of a graph with so many bytes of weights is told, while it is captured and replayed.
bool cached(size_t bytes, const Stream& stream) {
  Weight weight;
  weight.bytes.resize(bytes);
  bool said = false;
  const auto ask = [&said] { said = host_runtime::replays_cached_weights(); };
  aclmdlRI graph = nullptr;
  CHECK_OK(aclmdlRICaptureBegin(stream.handle, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  CHECK_OK(launch_with(stream.handle, {weight.whole()}));
  CHECK_OK(host_runtime::submit(stream.handle, std::make_shared<Operator>(ask)));
  CHECK_OK(aclmdlRICaptureEnd(stream.handle, &graph));
  CHECK_OK(aclmdlRIExecuteAsync(graph, stream.handle));
  CHECK_OK(aclrtSynchronizeStream(stream.handle));
  const bool replayed = said;
  CHECK_OK(host_runtime::submit(stream.handle, std::make_shared<Operator>(ask)));
  CHECK_OK(aclrtSynchronizeStream(stream.handle));
  CHECK(!said);  // behind the replay it is over
  CHECK_OK(aclmdlRIDestroy(graph));
  return replayed;
}

void few_weights_stay_cached_between_replays() {
  const long last_cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  const Stream stream;
  CHECK(cached(kBytes, stream) == (last_cache >= static_cast<long>(2 * kBytes)));
  CHECK(!cached((size_t{64} << 20) + 1, stream));
}

}  // namespace

extern const TestCase kFetchAheadTests[] = {
    {"weights_of_a_graph_in_a_loop_are_fetched", weights_of_a_graph_in_a_loop_are_fetched},
    {"graphs_in_turn_are_not_fetched", graphs_in_turn_are_not_fetched},
    {"what_is_written_or_read_in_part_is_not_fetched", what_is_written_or_read_in_part_is_not_fetched},
    {"no_more_than_the_cache_holds_is_fetched", no_more_than_the_cache_holds_is_fetched},
    {"few_weights_stay_cached_between_replays", few_weights_stay_cached_between_replays},
    {nullptr, nullptr},
};
