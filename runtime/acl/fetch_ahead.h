// Weights of a graph, fetched into a core's own cache before a replay comes to them: in the gap that the host
// leaves between two replays.
#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "runtime/acl/counters.h"
#include "runtime/acl/task.h"

namespace host_runtime {

struct Node;

/// The weights of a graph, as of the end of the capture, and what is fetched ahead of its replay.
class FetchAhead {
 public:
  /// Null for a graph without weights.
  static std::shared_ptr<const FetchAhead> of(const std::deque<Node>& nodes);

  /// Whether all weights are taken to stay in the processor's last cache from one replay to the next.
  bool stay_cached() const { return stay_cached_; }

  /// Fetches on from `done`, bytes into the weights that a replay reads first, until `enough()` or until they
  /// take up most of the cache. Returns how far it came.
  template <typename Enough>
  size_t first(size_t done, Enough enough) const {
    size_t before = 0;
    for (const Weight& weight : first_) {
      for (; done < before + weight.bytes; done += kPiece) {
        if (enough()) return done;
        const size_t at = done - before;
        fetch(weight.address, at, std::min(at + kPiece, weight.bytes));
      }
      before += weight.bytes;
      done = std::max(done, before);
    }
    return done;
  }

 private:
  struct Weight {
    const char* address = nullptr;
    size_t bytes = 0;
  };
  static constexpr size_t kLine = 64;
  static constexpr size_t kPiece = 16 * kLine;  ///< between two looks whether it is enough

  static void fetch(const char* address, size_t from, size_t to) {
    for (; from < to; from += kLine) __builtin_prefetch(address + from, 0, 2);
  }

  std::vector<Weight> first_;  ///< together what fits into a core's own cache
  bool stay_cached_ = false;
};

/// Between the replays of one graph on the thread of its stream. Of that thread alone.
class BetweenReplays {
 public:
  /// A replay is over. From the second one of a graph in a row on, the next is taken to be of that graph too.
  void replayed(const std::shared_ptr<const FetchAhead>& graph) {
    again_ = graph != nullptr && graph == graph_;
    graph_ = graph;
    done_ = 0;
  }

  template <typename Enough>
  void fetch(Enough enough) {
    if (!again_) return;
    const size_t before = std::exchange(done_, graph_->first(done_, enough));
    if (done_ > before) count(Counter::kBytesFetchedAhead, done_ - before);
  }

 private:
  std::shared_ptr<const FetchAhead> graph_;
  bool again_ = false;
  size_t done_ = 0;
};

}  // namespace host_runtime
