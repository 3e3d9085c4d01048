// Runs the native tests of libascendcl: all of them, or those named on the command line.
#include <cstring>

#include "tests/runtime/native/check.h"

extern const TestCase kBoundsTests[];
extern const TestCase kBriefTaskTests[];
extern const TestCase kStreamTests[];
extern const TestCase kGraphTests[];
extern const TestCase kFetchAheadTests[];
extern const TestCase kPartTests[];
extern const TestCase kWaitTests[];
extern const TestCase kCheckingTests[];

int main(int argc, char** argv) {
  CHECK_OK(aclInit(nullptr));
  int run = 0;
  // What the checking mode finds is tested with the mode on; everything else must work in both.
  const bool checking = host_runtime::checking();
  for (const TestCase* tests : {kBoundsTests, kStreamTests, kBriefTaskTests, kGraphTests, kFetchAheadTests,
                                kPartTests, kWaitTests, checking ? kCheckingTests : nullptr}) {
    if (tests == nullptr) continue;
    for (const TestCase* test = tests; test->name != nullptr; ++test) {
      bool wanted = argc == 1;
      for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], test->name) == 0;
      if (!wanted) continue;
      CHECK_OK(aclrtSetDevice(0));
      test->body();
      std::printf("%s passed\n", test->name);
      std::fflush(stdout);
      ++run;
    }
  }
  CHECK(run > 0);
  CHECK_OK(aclrtResetDevice(0));
  CHECK_OK(aclFinalize());
  return 0;
}
