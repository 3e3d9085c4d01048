// The checking mode: hooks that streams, events and memory call (docs/host_runtime.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace host_runtime {

struct Allocation;
class Stream;
class Task;

inline void checking_submitted(Stream&, Task&) {}
inline void checking_before(Stream&, Task&) {}
inline void checking_after(Stream&, Task&) {}
inline void checking_synchronized(Stream&, uint64_t) {}

inline void checking_allocated(void*, size_t) {}
inline void checking_host_copy(const char*, const void*, size_t, const void*, size_t) {}
/// True when the checking mode keeps the memory for a while, poisoned.
inline bool checking_freed(const Allocation&) { return false; }

}  // namespace host_runtime
