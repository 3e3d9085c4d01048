#include "runtime/hccl/segment.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>

#include "runtime/hccl/errors.h"

namespace host_runtime::hccl {
namespace {

constexpr char kNamePrefix[] = "npu_compiler_hccl_";
// A sleeping rank looks at its peers' processes this often.
constexpr auto kLivenessInterval = std::chrono::milliseconds(50);

struct ProcessStat {
  char state;
  uint64_t started;
};

/// State letter and start time of a process; state 'X' when there is none.
ProcessStat process_stat(int32_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return {'X', 0};
  // The command name may hold spaces and parentheses: fields are counted from the last ')'.
  const size_t end = line.rfind(')');
  if (end == std::string::npos) return {'X', 0};
  ProcessStat stat{'X', 0};
  unsigned long long started = 0;
  const char* format = " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu";
  if (std::sscanf(line.c_str() + end + 1, format, &stat.state, &started) != 2) return {'X', 0};
  stat.started = started;
  return stat;
}

bool process_runs(int32_t pid, uint64_t started) {
  const ProcessStat stat = process_stat(pid);
  return stat.state != 'X' && stat.state != 'Z' && stat.started == started;
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, std::chrono::milliseconds limit) {
  timespec time{};
  time.tv_sec = limit.count() / 1000;
  time.tv_nsec = (limit.count() % 1000) * 1000000;
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &time, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

/// A segment's pages are taken when they are first touched, and a full file system then kills the process:
/// better say so while the communicator is made.
void require_room(int file, size_t bytes) {
  struct statvfs status{};
  if (fstatvfs(file, &status) != 0) return;
  const size_t free = static_cast<size_t>(status.f_bavail) * status.f_frsize;
  // A file system without a limit reports no blocks at all.
  if (status.f_blocks == 0 || free >= bytes) return;
  constexpr size_t kMiB = size_t{1} << 20;
  throw Error(HCCL_E_MEMORY,
              "the communicator needs up to " + std::to_string(bytes / kMiB + 1) +
                  " MiB of shared memory, /dev/shm has " + std::to_string(free / kMiB) +
                  " MiB free; enlarge it (docker run --shm-size) or destroy other communicators");
}

std::string errno_text(const char* call) { return std::string(call) + ": " + std::strerror(errno); }

}  // namespace

size_t Segment::total_bytes(uint32_t ranks) {
  return sizeof(Control) + ranks * sizeof(RankState) + size_t{ranks} * 2 * kSlotBytes +
         size_t{ranks} * ranks * sizeof(Lane);
}

Segment::Segment(const std::string& name, uint32_t ranks, uint32_t rank)
    : name_(name), ranks_(ranks), rank_(rank) {
  open(name);
  auto* cursor = static_cast<std::byte*>(base_);
  control_ = reinterpret_cast<Control*>(cursor);
  states_ = reinterpret_cast<RankState*>(cursor += sizeof(Control));
  lanes_ = reinterpret_cast<Lane*>(cursor += ranks_ * sizeof(RankState));
  slots_ = cursor + size_t{ranks_} * ranks_ * sizeof(Lane);
  claim();
}

Segment::~Segment() {
  if (base_ == nullptr) return;
  if (control_->ready.load() == 0) shm_unlink(name_.c_str());
  states_[rank_].left.store(1);
  ring_all();
  munmap(base_, total_bytes(ranks_));
}

void Segment::open(const std::string& name) {
  const size_t bytes = total_bytes(ranks_);
  const int file = shm_open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0) throw Error(HCCL_E_SYSCALL, errno_text("shm_open"));
  struct Closer {
    int file;
    ~Closer() {
      flock(file, LOCK_UN);  // a mapping keeps the file open, and with it the lock
      close(file);
    }
  } closer{file};
  // The lock orders the ranks that size the file; all of them ask for the same size.
  flock(file, LOCK_EX);
  struct stat status{};
  fstat(file, &status);
  if (status.st_size == 0) {
    require_room(file, bytes);
    if (ftruncate(file, static_cast<off_t>(bytes)) != 0) {
      throw Error(HCCL_E_MEMORY, errno_text("ftruncate of the shared memory segment"));
    }
  }
  if (status.st_size != 0 && static_cast<size_t>(status.st_size) != bytes) {
    throw Error(HCCL_E_PARA,
                "rank " + std::to_string(rank_) + " asks for " + std::to_string(ranks_) +
                    " ranks, but another rank of the same root info asked for a different number");
  }
  base_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (base_ == MAP_FAILED) {
    base_ = nullptr;
    throw Error(HCCL_E_MEMORY, errno_text("mmap of the shared memory segment"));
  }
}

void Segment::claim() {
  RankState& mine = states_[rank_];
  int32_t nobody = 0;
  mine.started.store(process_stat(getpid()).started);
  if (!mine.pid.compare_exchange_strong(nobody, getpid())) {
    const std::string owner = describe(rank_);
    munmap(base_, total_bytes(ranks_));
    base_ = nullptr;
    throw Error(HCCL_E_PARA,
                owner + " already joined this communicator; give every process a rank of its own");
  }
  control_->ranks.store(ranks_);
  if (control_->attached.fetch_add(1) + 1 == ranks_) {
    // Only the last one unlinks, before anybody can go on: a later segment of the same name is never hit.
    shm_unlink(name_.c_str());
    control_->ready.store(1);
    ring_all();
  }
}

void Segment::wait_for_all(std::chrono::milliseconds timeout) {
  auto missing = [this] {
    std::vector<uint32_t> absent;
    for (uint32_t rank = 0; rank < ranks_; ++rank) {
      const int32_t pid = states_[rank].pid.load();
      if (pid == 0 || !alive(rank)) absent.push_back(rank);
    }
    return absent;
  };
  try {
    wait([this] { return control_->ready.load() != 0; }, missing, timeout);
  } catch (const WaitFailure& failure) {
    std::string text, never;
    for (uint32_t rank : missing()) {
      text += (text.empty() ? "" : ", ") + describe(rank);
      if (states_[rank].pid.load() == 0) never += (never.empty() ? ": " : ", ") + describe(rank);
    }
    if (failure.reason != WaitFailure::Reason::kTimeout) {
      // It may have ended because it waited for the others in vain: they are the cause, then.
      throw Error(HCCL_E_REMOTE, describe(failure.rank) + " ended before all ranks had joined" + never);
    }
    throw Error(HCCL_E_TIMEOUT, "after " + std::to_string(timeout.count() / 1000) + " s rank " +
                                    std::to_string(rank_) + " of " + std::to_string(ranks_) +
                                    " still waits for " + text +
                                    " to join. Look for its error first; if it only starts late, raise " +
                                    "HCCL_CONNECT_TIMEOUT (the wait is its value plus 20 s)");
  }
}

void Segment::ring(uint32_t rank) const {
  RankState& peer = states_[rank];
  peer.bell.fetch_add(1, std::memory_order_seq_cst);
  if (peer.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(peer.bell);
}

void Segment::ring_all() const {
  for (uint32_t rank = 0; rank < ranks_; ++rank) {
    if (rank != rank_) ring(rank);
  }
}

void Segment::pause(int iteration) {
  // Two ranks may share one core: let the other run now and then instead of burning its time slice.
  if (iteration % 16 == 15) {
    sched_yield();
  } else {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

void Segment::sleep_until(const Predicate& ready, const Missing& missing,
                          std::chrono::milliseconds timeout) const {
  const auto start = std::chrono::steady_clock::now();
  RankState& mine = states_[rank_];
  while (true) {
    const uint32_t seen = mine.bell.load(std::memory_order_seq_cst);
    mine.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const bool done = ready();
    const bool failed = control_->failure.load() == 2;
    if (!done && !failed) futex_wait(mine.bell, seen, kLivenessInterval);
    mine.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (done || ready()) return;
    if (failed) throw WaitFailure{WaitFailure::Reason::kPeerFailed, rank_};
    if (mine.bell.load(std::memory_order_seq_cst) != seen) continue;
    for (uint32_t rank : missing()) {
      if (states_[rank].pid.load() == 0) continue;
      const bool left = states_[rank].left.load() != 0;
      if (!left && alive(rank)) continue;
      // It may have finished its part just before it ended.
      if (ready()) return;
      throw WaitFailure{left ? WaitFailure::Reason::kLeft : WaitFailure::Reason::kDead, rank};
    }
    const auto waited = std::chrono::steady_clock::now() - start;
    if (timeout.count() > 0 && waited >= timeout) {
      const auto absent = missing();
      if (ready()) return;
      throw WaitFailure{WaitFailure::Reason::kTimeout, absent.empty() ? rank_ : absent.front()};
    }
  }
}

std::string Segment::describe(uint32_t rank) const {
  const int32_t pid = states_[rank].pid.load();
  if (pid == 0) return "rank " + std::to_string(rank) + " (never joined)";
  return "rank " + std::to_string(rank) + " (pid " + std::to_string(pid) + ")";
}

bool Segment::alive(uint32_t rank) const {
  const int32_t pid = states_[rank].pid.load();
  return pid == getpid() || process_runs(pid, states_[rank].started.load());
}

std::string fresh_segment_name() {
  std::random_device entropy;
  char text[96];
  std::snprintf(text, sizeof(text), "/%s%d_%08x%08x", kNamePrefix, getpid(), entropy(), entropy());
  return text;
}

void remove_stale_segment(const std::string& name) {
  const int file = shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0600);
  if (file < 0) return;
  flock(file, LOCK_EX);
  struct stat status{};
  fstat(file, &status);
  const size_t bytes = static_cast<size_t>(status.st_size);
  void* base = bytes < sizeof(Control) ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0);
  bool stale = false;
  if (base != MAP_FAILED) {
    const auto* control = static_cast<const Control*>(base);
    const auto* states = reinterpret_cast<const RankState*>(control + 1);
    const uint32_t ranks = std::min(control->ranks.load(), kMaxRanks);
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      const int32_t pid = states[rank].pid.load();
      stale = stale || (pid != 0 && !process_runs(pid, states[rank].started.load()));
    }
    munmap(base, bytes);
  }
  // Another rank may have replaced it while this one waited for the lock.
  const int now = shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0600);
  struct stat current{};
  if (stale && now >= 0 && fstat(now, &current) == 0 && current.st_ino == status.st_ino)
    shm_unlink(name.c_str());
  if (now >= 0) close(now);
  flock(file, LOCK_UN);
  close(file);
}

void remove_abandoned_segments() {
  DIR* folder = opendir("/dev/shm");
  if (folder == nullptr) return;
  const size_t prefix = sizeof(kNamePrefix) - 1;
  while (const dirent* entry = readdir(folder)) {
    if (std::strncmp(entry->d_name, kNamePrefix, prefix) != 0) continue;
    const int32_t pid = std::atoi(entry->d_name + prefix);
    if (pid > 0 && process_stat(pid).state == 'X') shm_unlink((std::string("/") + entry->d_name).c_str());
  }
  closedir(folder);
}

}  // namespace host_runtime::hccl
