// The one setting of the host runtime: the environment variable NPU_COMPILER_HOST (docs/host_runtime.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace host_runtime {

enum class CheckMode { kOff, kOn, kFatal };

struct Settings {
  uint32_t devices = 8;               ///< number of devices
  std::string soc = "Ascend910B3";    ///< what aclrtGetSocName returns
  uint64_t hbm = uint64_t{64} << 30;  ///< bytes of memory of each device
  CheckMode check = CheckMode::kOff;  ///< the checking mode; kFatal: what it finds fails the task
  uint64_t seed = 0;                  ///< of the random delays of the checking mode
  uint32_t delay_us = 200;            ///< largest random delay of a task in the checking mode, microseconds
  uint32_t streams = 2048;            ///< streams of a device, those held by captured graphs included
  uint32_t spin_us = 1000;     ///< how long a waiting thread spins at most before it sleeps, microseconds
  std::string cann = "9.1.0";  ///< the CANN version that is reported
  std::string error;           ///< why the variable could not be read; empty when it could
};

/// Reads `text` ("devices=2,hbm=1GiB"); on an error only `error` of the result is meaningful.
Settings parse_settings(const std::string& text);

/// The process's settings, read once.
const Settings& settings();

}  // namespace host_runtime
