// Who touched which memory last: the memory of the checking mode.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "runtime/acl/task.h"

namespace host_runtime {

/// A vector clock: of each actor (a stream, a stream of a graph, the host) the number of its steps that come
/// before.
using VectorClock = std::map<uint64_t, uint64_t>;

/// Adds to `clock` what `other` knows.
void join(VectorClock& clock, const VectorClock& other);

/// One access that was made: by which actor, at which of its steps, by what.
struct PastAccess {
  uint64_t actor = 0;
  uint64_t step = 0;
  std::string what;

  bool happens_before(const VectorClock& clock) const {
    const auto known = clock.find(actor);
    return known != clock.end() && known->second >= step;
  }
};

/// Two accesses to the same bytes, at least one of them a write, that nothing orders.
struct Conflict {
  PastAccess earlier;
  bool earlier_wrote;
  uintptr_t address;
};

class ShadowMemory {
 public:
  /// Enters an access and returns the first conflict with an earlier one.
  std::optional<Conflict> access(const MemoryAccess& range, const PastAccess& now, const VectorClock& clock);
  /// Forgets a range (it was freed), and returns a conflict with an access that may not be over.
  std::optional<Conflict> forget(uintptr_t begin, size_t bytes, const VectorClock& clock);

 private:
  struct Cell {
    uintptr_t end;
    std::optional<PastAccess> write;
    std::vector<PastAccess> reads;  // the last of each actor since the write
  };
  using Cells = std::map<uintptr_t, Cell>;

  /// Makes `at` a boundary between cells.
  void split(uintptr_t at);
  static std::optional<Conflict> conflict(uintptr_t address, const Cell& cell, bool writes,
                                          const VectorClock& clock);

  Cells cells_;
};

}  // namespace host_runtime
