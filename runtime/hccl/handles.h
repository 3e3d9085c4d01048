// HcclComm handles, and the tasks collected between HcclGroupStart and HcclGroupEnd.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/hccl/collectives.h"

namespace host_runtime::hccl {

HcclComm publish(CommunicatorPtr communicator);
/// Throws Error(HCCL_E_PTR or HCCL_E_PARA) for a handle that is null, unknown or already destroyed.
CommunicatorPtr resolve(HcclComm handle);
/// Removes the handle; tasks and captured graphs that use the communicator keep it alive.
void withdraw(HcclComm handle);

/// Submits `task`, or keeps it until HcclGroupEnd. Throws Error(HCCL_E_RUNTIME) when the stream does not take
/// it.
void launch(aclrtStream stream, TaskPtr task);
/// As launch(); inside a group the messages of one communicator and stream become one task, as their order
/// between ranks may differ.
void launch_message(aclrtStream stream, CommunicatorPtr communicator, const Message& message,
                    const char* name);
void group_start();
void group_end();

}  // namespace host_runtime::hccl
