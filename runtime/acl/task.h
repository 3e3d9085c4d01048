// The internal door between the libraries of the host runtime: libopapi and libhccl hand work to streams
// through `submit`, and nothing else of libascendcl is known to them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "acl/acl.h"

#define HOST_RUNTIME_API __attribute__((visibility("default")))

namespace host_runtime {

/// A range of device or host memory that a task reads or writes; the checking mode looks for races between
/// them.
struct MemoryAccess {
  enum class Mode : uint8_t { kRead, kWrite, kReadWrite };
  const void* address;
  size_t bytes;
  Mode mode;
  bool whole = false;  ///< read from the first byte to the last: the weight of a product
};

/// One asynchronous unit of work. A stream runs its tasks one at a time, in order of submission; a captured
/// graph keeps the task and runs it again at each replay, so run() must leave the task as it found it, and
/// the task must own everything it uses except device memory.
class HOST_RUNTIME_API Task {
 public:
  virtual ~Task() = default;

  /// Does the work. Throws TaskError (or any std::exception) when it cannot; the stream then fails as CANN's
  /// does.
  virtual void run() = 0;

  /// The name users know: "aclnnAdd", "HcclAllReduce", "aclrtMemcpyAsync".
  virtual std::string name() const = 0;

  /// What run() touches. Empty means "unknown", which the checking mode reports as not checked.
  virtual std::vector<MemoryAccess> accesses() const { return {}; }

  /// Arguments as one JSON object (shapes, dtypes, scalars), for the graph's debug print and introspection.
  virtual std::string arguments_json() const { return "{}"; }
};
using TaskPtr = std::shared_ptr<Task>;

/// Why a task failed: `code` is what synchronising the stream returns (CANN's error code).
class HOST_RUNTIME_API TaskError : public std::runtime_error {
 public:
  TaskError(aclError code, const std::string& what) : std::runtime_error(what), code(code) {}
  aclError code;
};

/// Hands `task` to `stream` (nullptr: the current device's default stream): queues it, records it when the
/// stream is capturing, or collects it when a task group of a graph is being updated. Never waits for the
/// task to run. Errors: 107xxx as aclrtLaunch*; the message is set for aclGetRecentErrMsg.
HOST_RUNTIME_API aclError submit(aclrtStream stream, TaskPtr task);

/// Whether the calling thread runs tasks of a stream that it waits for: one of the program's own, with
/// whatever state the program has given it.
HOST_RUNTIME_API bool on_borrowed_thread();

/// Whether another thread runs tasks of the same graph beside the calling one. A kernel then stays on its
/// thread: the cores have their work.
HOST_RUNTIME_API bool runs_beside_others();

/// Whether the calling thread replays a graph of so few weights that the last replay's are still in the
/// processor's last cache.
HOST_RUNTIME_API bool replays_cached_weights();

/// Sets what aclGetRecentErrMsg returns next on this thread, and returns `code` so that callers can `return
/// fail(...)`.
HOST_RUNTIME_API aclError fail(aclError code, const std::string& message);

/// Zeroes memory. Of whole pages of device memory the pages are dropped instead of written (from 2 MiB on),
/// so that zeroing memory that nobody touched yet costs nothing.
HOST_RUNTIME_API void zero_fill(void* pointer, size_t bytes);

/// Fills memory with a pattern that reads as NaN, when the checking mode is on; otherwise does nothing. For
/// memory whose content is undefined, such as an operator's workspace.
HOST_RUNTIME_API void poison(void* memory, size_t bytes);

/// Whether the checking mode is on (see docs/host_runtime.md).
HOST_RUNTIME_API bool checking();

}  // namespace host_runtime
