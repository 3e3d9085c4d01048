// Tasks that write a number to device memory, or wait until one is there.
#pragma once

#include "runtime/acl/event.h"

namespace host_runtime {

class ValueTask final : public WaitingTask, public BriefTask {
 public:
  ValueTask(bool is_wait, void* address, uint64_t value, uint32_t flag)
      : is_wait(is_wait), address(static_cast<uint64_t*>(address)), value(value), flag(flag) {}

  void run() override;
  /// A write is done even on a failed stream, so that nobody hangs; whoever waits for it then fails.
  void skip(const StreamFailure& failure) override;
  bool ready() const override;
  bool gives_order() const override { return !is_wait; }
  bool brief() const override { return !is_wait; }
  std::string name() const override { return is_wait ? "aclrtValueWait" : "aclrtValueWrite"; }
  std::string arguments_json() const override;

  const bool is_wait;
  uint64_t* const address;
  const uint64_t value;
  const uint32_t flag;  ///< ACL_STREAM_WAIT_VALUE_*

 private:
  bool holds(uint64_t present) const;
};

}  // namespace host_runtime
