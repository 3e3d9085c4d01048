// Calls that load or launch code for the device's own cores, and CANN's data dump. The host has no such
// cores: each call fails with a message.
#include "profiling/aprof_pub.h"
#include "runtime/acl/error.h"

using namespace host_runtime;

namespace {

aclError refuse_device_code(const char* function) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              std::string(function) + ": kernels compiled for Ascend cores cannot run on the host runtime");
}

aclError refuse_dump(const char* function) {
  return fail(ACL_ERROR_API_NOT_SUPPORT,
              std::string(function) + ": the host runtime does not dump operator data");
}

}  // namespace

aclError aclrtBinaryLoadFromData(const void*, size_t, const aclrtBinaryLoadOptions*, aclrtBinHandle*) {
  return refuse_device_code("aclrtBinaryLoadFromData");
}

aclError aclrtBinaryLoadFromFile(const char*, aclrtBinaryLoadOptions*, aclrtBinHandle*) {
  return refuse_device_code("aclrtBinaryLoadFromFile");
}

aclError aclrtBinaryGetFunction(const aclrtBinHandle, const char*, aclrtFuncHandle*) {
  return refuse_device_code("aclrtBinaryGetFunction");
}

aclError aclrtGetFunctionAddr(aclrtFuncHandle, void**, void**) {
  return refuse_device_code("aclrtGetFunctionAddr");
}

aclError aclrtLaunchKernel(aclrtFuncHandle, uint32_t, const void*, size_t, aclrtStream) {
  return refuse_device_code("aclrtLaunchKernel");
}

aclError aclrtLaunchKernelWithConfig(aclrtFuncHandle, uint32_t, aclrtStream, aclrtLaunchKernelCfg*,
                                     aclrtArgsHandle, void*) {
  return refuse_device_code("aclrtLaunchKernelWithConfig");
}

aclError aclmdlInitDump() { return refuse_dump("aclmdlInitDump"); }
aclError aclmdlSetDump(const char*) { return refuse_dump("aclmdlSetDump"); }
aclError aclmdlFinalizeDump() { return ACL_SUCCESS; }

// Below libascendcl: what torch_npu's kernel launchers (MLIR, DVM) call directly.
extern "C" {
HOST_RUNTIME_API int32_t rtDevBinaryRegister(const void*, void**) {
  return refuse_device_code("rtDevBinaryRegister");
}

HOST_RUNTIME_API int32_t rtFunctionRegister(void*, const void*, const char*, const void*, uint32_t) {
  return refuse_device_code("rtFunctionRegister");
}

HOST_RUNTIME_API int32_t rtKernelLaunch(const void*, uint32_t, void*, uint32_t, void*, void*) {
  return refuse_device_code("rtKernelLaunch");
}

HOST_RUNTIME_API int32_t rtGetC2cCtrlAddr(uint64_t*, uint32_t*) {
  return refuse_device_code("rtGetC2cCtrlAddr");
}

// Reports of those launchers to CANN's profiler. Nobody collects them here.
HOST_RUNTIME_API int32_t MsprofRegisterCallback(uint32_t, ProfCommandHandle) { return 0; }
HOST_RUNTIME_API int32_t MsprofReportApi(uint32_t, const struct MsprofApi*) { return 0; }
HOST_RUNTIME_API int32_t MsprofReportCompactInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
HOST_RUNTIME_API int32_t MsprofReportAdditionalInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
HOST_RUNTIME_API uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
HOST_RUNTIME_API uint64_t MsprofSysCycleTime(void) { return 0; }
}
