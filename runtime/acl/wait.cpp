#include "runtime/acl/wait.h"

#include <sched.h>

namespace host_runtime {

int usable_cores() {
  static const int count = [] {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    return sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
  }();
  return count;
}

}  // namespace host_runtime
