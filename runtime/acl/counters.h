// What the host runtime counted in this process; read by runtime/counters.py.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace host_runtime {

enum class Counter : size_t {
  kHostSynchronizations,  ///< host threads that waited for a stream, event or device; blocking copies and
                          ///< fills blocking copies
  kTasks,                 ///< tasks handed to streams, replays included, captured tasks not
  kGraphLaunches,         ///< aclmdlRIExecute and aclmdlRIExecuteAsync
  kGraphNodes,            ///< nodes run by replays
  kCaptures,              ///< captures that ended well
  kCapturedTasks,         ///< tasks recorded by captures
  kTaskGroupUpdates,      ///< task groups of graphs updated
  kFailedTasks,           ///< tasks that failed
  kSkippedTasks,          ///< tasks not run because an earlier one on their stream failed
  kRaces,                 ///< missing waits that the checking mode reported
  kUncheckedTasks,        ///< tasks the checking mode could not judge: they do not say what they touch
  kBytesFetchedAhead,     ///< of weights, between two replays of a graph
  kHelpedKernels,         ///< times a waiting thread did parts of a kernel
  kCount
};

void count(Counter counter, uint64_t by = 1);

}  // namespace host_runtime
