// Replays captured graphs through CANN's C interface, for valgrind to count (`python -m benchmarks
// instructions`):
//     replay_instructions REPLAYS empty|add NODES [empty|add NODES ...]
// Each graph has NODES tasks that do nothing, or NODES additions of 16 floats (aclnnAdd). One after the other
// they are launched REPLAYS times, each time waited for. Exit code 1 with a message when a call fails or a
// sum is wrong.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "acl/acl.h"
#include "runtime/acl/task.h"

struct aclTensor;
struct aclScalar;
struct aclOpExecutor;
extern "C" {
aclTensor* aclCreateTensor(const int64_t* dims, uint64_t dims_count, aclDataType type, const int64_t* strides,
                           int64_t offset, aclFormat format, const int64_t* storage_dims,
                           uint64_t storage_dims_count, void* data);
aclScalar* aclCreateScalar(void* value, aclDataType type);
int aclDestroyTensor(const aclTensor* tensor);
int aclDestroyScalar(const aclScalar* scalar);
int aclnnAddGetWorkspaceSize(const aclTensor* self, const aclTensor* other, const aclScalar* alpha,
                             aclTensor* out, uint64_t* workspace, aclOpExecutor** executor);
int aclnnAdd(void* workspace, uint64_t size, aclOpExecutor* executor, aclrtStream stream);
}

namespace {

constexpr int64_t kElements = 16;

void require(int code, const char* call) {
  if (code == 0) return;
  const char* message = aclGetRecentErrMsg();
  std::fprintf(stderr, "%s returned %d: %s\n", call, code, message == nullptr ? "" : message);
  std::exit(1);
}
#define REQUIRE(call) require((call), #call)

class Nothing final : public host_runtime::Task {
 public:
  void run() override {}
  std::string name() const override { return "nothing"; }
};

/// sum += one, of floats.
class Addition {
 public:
  Addition() : sum_(filled(0.0f)), one_(filled(1.0f)) {}
  ~Addition() {
    REQUIRE(aclrtFree(sum_));
    REQUIRE(aclrtFree(one_));
  }
  Addition(const Addition&) = delete;
  Addition& operator=(const Addition&) = delete;

  void launch(aclrtStream stream) const {
    uint64_t size = 0;
    aclOpExecutor* executor = nullptr;
    float alpha = 1.0f;
    aclTensor* sum = tensor(sum_);
    aclTensor* one = tensor(one_);
    aclScalar* scalar = aclCreateScalar(&alpha, ACL_FLOAT);
    REQUIRE(aclnnAddGetWorkspaceSize(sum, one, scalar, sum, &size, &executor));
    REQUIRE(aclnnAdd(nullptr, size, executor, stream));
    REQUIRE(aclDestroyTensor(sum));
    REQUIRE(aclDestroyTensor(one));
    REQUIRE(aclDestroyScalar(scalar));
  }

  float sum() const {
    float value = 0;
    REQUIRE(aclrtMemcpy(&value, sizeof value, sum_, sizeof value, ACL_MEMCPY_DEVICE_TO_HOST));
    return value;
  }

 private:
  static void* filled(float value) {
    float values[kElements];
    for (float& each : values) each = value;
    void* memory = nullptr;
    REQUIRE(aclrtMalloc(&memory, sizeof values, ACL_MEM_MALLOC_HUGE_FIRST));
    REQUIRE(aclrtMemcpy(memory, sizeof values, values, sizeof values, ACL_MEMCPY_HOST_TO_DEVICE));
    return memory;
  }
  static aclTensor* tensor(void* memory) {
    const int64_t dims[] = {kElements};
    const int64_t strides[] = {1};
    return aclCreateTensor(dims, 1, ACL_FLOAT, strides, 0, ACL_FORMAT_ND, dims, 1, memory);
  }

  void* sum_;
  void* one_;
};

void replay(aclrtStream stream, bool adds, int nodes, int replays) {
  const Addition addition;
  REQUIRE(aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL));
  for (int i = 0; i < nodes; ++i) {
    if (adds) {
      addition.launch(stream);
    } else {
      REQUIRE(host_runtime::submit(stream, std::make_shared<Nothing>()));
    }
  }
  aclmdlRI graph = nullptr;
  REQUIRE(aclmdlRICaptureEnd(stream, &graph));
  for (int i = 0; i < replays; ++i) {
    REQUIRE(aclmdlRIExecuteAsync(graph, stream));
    REQUIRE(aclrtSynchronizeStream(stream));
  }
  REQUIRE(aclmdlRIDestroy(graph));
  const float wanted = adds ? static_cast<float>(nodes) * static_cast<float>(replays) : 0.0f;
  if (addition.sum() == wanted) return;
  std::fprintf(stderr, "%d replays of %d additions gave %g, expected %g\n", replays, nodes, addition.sum(),
               wanted);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc % 2 != 0) {
    std::fprintf(stderr, "usage: %s REPLAYS empty|add NODES [empty|add NODES ...]\n", argv[0]);
    return 1;
  }
  REQUIRE(aclInit(nullptr));
  REQUIRE(aclrtSetDevice(0));
  aclrtStream stream = nullptr;
  REQUIRE(aclrtCreateStream(&stream));
  for (int i = 2; i < argc; i += 2)
    replay(stream, std::string(argv[i]) == "add", std::atoi(argv[i + 1]), std::atoi(argv[1]));
  REQUIRE(aclrtDestroyStream(stream));
  REQUIRE(aclrtResetDevice(0));
  REQUIRE(aclFinalize());
  return 0;
}
