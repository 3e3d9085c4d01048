#include "runtime/acl/shadow.h"

#include <algorithm>

namespace host_runtime {

void join(VectorClock& clock, const VectorClock& other) {
  for (const auto& [actor, step] : other) {
    uint64_t& known = clock[actor];
    known = std::max(known, step);
  }
}

void ShadowMemory::split(uintptr_t at) {
  auto after = cells_.upper_bound(at);
  if (after == cells_.begin()) return;
  const auto cell = std::prev(after);
  if (cell->first == at || cell->second.end <= at) return;
  Cell tail = cell->second;
  cell->second.end = at;
  cells_.emplace(at, std::move(tail));
}

std::optional<Conflict> ShadowMemory::conflict(uintptr_t address, const Cell& cell, bool writes,
                                               const VectorClock& clock) {
  if (cell.write && !cell.write->happens_before(clock)) return Conflict{*cell.write, true, address};
  if (!writes) return std::nullopt;
  for (const PastAccess& read : cell.reads) {
    if (!read.happens_before(clock)) return Conflict{read, false, address};
  }
  return std::nullopt;
}

std::optional<Conflict> ShadowMemory::access(const MemoryAccess& range, const PastAccess& now,
                                             const VectorClock& clock) {
  if (range.bytes == 0) return std::nullopt;
  const auto begin = reinterpret_cast<uintptr_t>(range.address);
  const uintptr_t end = begin + range.bytes;
  const bool writes = range.mode != MemoryAccess::Mode::kRead;
  split(begin);
  split(end);
  std::optional<Conflict> found;
  uintptr_t covered = begin;
  for (auto cell = cells_.lower_bound(begin); covered < end;) {
    if (cell == cells_.end() || cell->first > covered) {
      const uintptr_t gap_end = cell == cells_.end() ? end : std::min(end, cell->first);
      cell = cells_.emplace(covered, Cell{gap_end, std::nullopt, {}}).first;
    }
    if (!found) found = conflict(cell->first, cell->second, writes, clock);
    auto& reads = cell->second.reads;
    if (writes) {
      cell->second.write = now;
      reads.clear();
    } else {
      reads.erase(std::remove_if(reads.begin(), reads.end(),
                                 [&](const PastAccess& read) { return read.actor == now.actor; }),
                  reads.end());
      reads.push_back(now);
    }
    covered = cell->second.end;
    ++cell;
  }
  return found;
}

std::optional<Conflict> ShadowMemory::forget(uintptr_t begin, size_t bytes, const VectorClock& clock) {
  split(begin);
  split(begin + bytes);
  std::optional<Conflict> found;
  auto cell = cells_.lower_bound(begin);
  while (cell != cells_.end() && cell->first < begin + bytes) {
    if (!found) found = conflict(cell->first, cell->second, true, clock);
    cell = cells_.erase(cell);
  }
  return found;
}

}  // namespace host_runtime
