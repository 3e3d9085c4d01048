// What the runtime says about itself and its devices: versions, chip, capabilities, options.
#include <cstring>
#include <map>
#include <mutex>

#include "acl/acl_op_compiler.h"
#include "runtime/acl/device.h"
#include "runtime/acl/legacy_op.h"
#include "runtime/acl/stream.h"

using namespace host_runtime;

namespace {

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

// The parts of an Ascend 910B3 (Atlas 800T A2); other chips of the family differ little, and only reports use
// them.
constexpr int64_t kCubeCores = 20;
constexpr int64_t kVectorCores = 40;
constexpr int64_t kAiCpus = 6;
constexpr int64_t kL2Bytes = int64_t{192} << 20;
constexpr int64_t kUnifiedBufferBytes = int64_t{192} << 10;
constexpr const char* kDriverVersion = "26.0.0";

std::mutex options_mutex;

std::map<int, int64_t>& system_options() {
  static auto* const options = new std::map<int, int64_t>;
  return *options;
}

std::map<int, std::string>& compile_options() {
  static auto* const options = new std::map<int, std::string>;
  return *options;
}

aclError get_system_option(aclSysParamOpt opt, int64_t* value, const char* function) {
  if (value == nullptr) return fail_null(function, "value");
  std::lock_guard lock(options_mutex);
  const auto found = system_options().find(opt);
  *value = found == system_options().end() ? 0 : found->second;  // every option is off until it is set
  return ACL_SUCCESS;
}

aclError set_system_option(aclSysParamOpt opt, int64_t value, const char* function) {
  if (opt < ACL_OPT_DETERMINISTIC || opt > ACL_OPT_STRONG_CONSISTENCY) {
    return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": unknown option " + std::to_string(opt));
  }
  std::lock_guard lock(options_mutex);
  system_options()[opt] = value;
  return ACL_SUCCESS;
}

void copy_text(char* to, size_t room, const std::string& text) {
  std::strncpy(to, text.c_str(), room - 1);
  to[room - 1] = '\0';
}

/// The `index`-th part of a dotted version.
std::string version_part(const std::string& version, int index) {
  size_t begin = 0;
  for (int i = 0; i < index && begin != std::string::npos; ++i) {
    begin = version.find('.', begin);
    if (begin != std::string::npos) ++begin;
  }
  if (begin == std::string::npos) return "";
  return version.substr(begin, version.find('.', begin) - begin);
}

uint32_t all_cores(int type) {
  return static_cast<uint32_t>(type == ACL_RT_DEV_RES_CUBE_CORE ? kCubeCores : kVectorCores);
}

bool known_limit(aclrtDevResLimitType type) {
  return type == ACL_RT_DEV_RES_CUBE_CORE || type == ACL_RT_DEV_RES_VECTOR_CORE;
}

uint32_t limit_in(const std::map<int, uint32_t>& limits, aclrtDevResLimitType type, uint32_t otherwise) {
  const auto found = limits.find(type);
  return found == limits.end() ? otherwise : found->second;
}

aclError check_limit(const char* function, aclrtDevResLimitType type, uint32_t value) {
  if (!known_limit(type))
    return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": unknown type of cores");
  if (value == 0 || value > all_cores(type)) {
    return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": value " + std::to_string(value) +
                                             " is not between 1 and " + std::to_string(all_cores(type)));
  }
  return ACL_SUCCESS;
}

// Whose core limits the calling thread uses (aclrtUseStreamResInCurrentThread). Limits are kept and reported;
// the host has no such cores to limit.
thread_local std::map<int, uint32_t> thread_limits;

}  // namespace

aclError aclInit(const char*) {
  if (!settings().error.empty()) return fail(ACL_ERROR_INVALID_PARAM, "aclInit: " + settings().error);
  static std::atomic<bool> initialized{false};
  if (initialized.exchange(true)) return fail(ACL_ERROR_REPEAT_INITIALIZE, "aclInit: was called before");
  return ACL_SUCCESS;
}

aclError aclFinalize() { return ACL_SUCCESS; }

aclError aclFinalizeReference(uint64_t* refCount) {
  if (refCount != nullptr) *refCount = 0;
  return ACL_SUCCESS;
}

const char* aclrtGetSocName() { return settings().soc.c_str(); }

aclError aclrtGetVersion(int32_t* majorVersion, int32_t* minorVersion, int32_t* patchVersion) {
  if (majorVersion == nullptr || minorVersion == nullptr || patchVersion == nullptr)
    return fail_null("aclrtGetVersion", "a version");
  *majorVersion = ACL_MAJOR_VERSION;
  *minorVersion = ACL_MINOR_VERSION;
  *patchVersion = ACL_PATCH_VERSION;
  return ACL_SUCCESS;
}

aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion* version) {
  if (version == nullptr) return fail_null("aclsysGetCANNVersion", "version");
  if (name < ACL_PKG_NAME_CANN || name > ACL_PKG_NAME_DRIVER) {
    return fail(ACL_ERROR_INVALID_PARAM, "aclsysGetCANNVersion: unknown package");
  }
  const std::string text = name == ACL_PKG_NAME_DRIVER ? kDriverVersion : settings().cann;
  *version = aclCANNPackageVersion{};
  copy_text(version->version, sizeof version->version, text);
  copy_text(version->majorVersion, sizeof version->majorVersion, version_part(text, 0));
  copy_text(version->minorVersion, sizeof version->minorVersion, version_part(text, 1));
  copy_text(version->releaseVersion, sizeof version->releaseVersion, version_part(text, 2));
  copy_text(version->patchVersion, sizeof version->patchVersion, version_part(text, 3));
  return ACL_SUCCESS;
}

aclError aclsysGetVersionStr(char* pkgName, char* versionStr) {
  if (pkgName == nullptr) return fail_null("aclsysGetVersionStr", "pkgName");
  if (versionStr == nullptr) return fail_null("aclsysGetVersionStr", "versionStr");
  copy_text(versionStr, ACL_PKG_VERSION_MAX_SIZE, settings().cann);
  return ACL_SUCCESS;
}

aclError aclsysGetVersionNum(char* pkgName, int32_t* versionNum) {
  if (pkgName == nullptr) return fail_null("aclsysGetVersionNum", "pkgName");
  if (versionNum == nullptr) return fail_null("aclsysGetVersionNum", "versionNum");
  const auto part = [](int index) { return std::atoi(version_part(settings().cann, index).c_str()); };
  *versionNum = part(0) * 10000000 + part(1) * 100000 + part(2) * 1000;
  return ACL_SUCCESS;
}

aclError aclGetCannAttributeList(const aclCannAttr** cannAttrList, size_t* num) {
  static const aclCannAttr attributes[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16,
                                           ACL_CANN_ATTR_JIT_COMPILE};
  if (cannAttrList == nullptr) return fail_null("aclGetCannAttributeList", "cannAttrList");
  if (num == nullptr) return fail_null("aclGetCannAttributeList", "num");
  *cannAttrList = attributes;
  *num = sizeof attributes / sizeof attributes[0];
  return ACL_SUCCESS;
}

aclError aclGetCannAttribute(aclCannAttr cannAttr, int32_t* value) {
  if (value == nullptr) return fail_null("aclGetCannAttribute", "value");
  if (cannAttr < ACL_CANN_ATTR_INF_NAN || cannAttr > ACL_CANN_ATTR_JIT_COMPILE) {
    return fail(ACL_ERROR_INVALID_PARAM, "aclGetCannAttribute: unknown attribute");
  }
  *value = 1;
  return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t deviceId, aclDeviceInfo deviceInfo, int64_t* value) {
  if (value == nullptr) return fail_null("aclGetDeviceCapability", "value");
  if (find_device(static_cast<int32_t>(deviceId), "aclGetDeviceCapability") == nullptr) return last_error();
  switch (deviceInfo) {
    case ACL_DEVICE_INFO_AI_CORE_NUM:
      *value = kCubeCores;
      return ACL_SUCCESS;
    case ACL_DEVICE_INFO_VECTOR_CORE_NUM:
      *value = kVectorCores;
      return ACL_SUCCESS;
    case ACL_DEVICE_INFO_L2_SIZE:
      *value = kL2Bytes;
      return ACL_SUCCESS;
    default:
      return fail(ACL_ERROR_INVALID_PARAM, "aclGetDeviceCapability: unknown deviceInfo");
  }
}

aclError aclrtGetDeviceInfo(uint32_t deviceId, aclrtDevAttr attr, int64_t* value) {
  if (value == nullptr) return fail_null("aclrtGetDeviceInfo", "value");
  const Device* device = find_device(static_cast<int32_t>(deviceId), "aclrtGetDeviceInfo");
  if (device == nullptr) return last_error();
  switch (attr) {
    case ACL_DEV_ATTR_AICPU_CORE_NUM:
      *value = kAiCpus;
      break;
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM:
      *value = kCubeCores;
      break;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM:
      *value = kVectorCores;
      break;
    case ACL_DEV_ATTR_UBUF_PER_VECTOR_CORE:
      *value = kUnifiedBufferBytes;
      break;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE:
      *value = static_cast<int64_t>(device->memory.total());
      break;
    case ACL_DEV_ATTR_L2_CACHE_SIZE:
      *value = kL2Bytes;
      break;
    case ACL_DEV_ATTR_PHY_CHIP_ID:
      *value = deviceId;
      break;
    case ACL_DEV_ATTR_SMP_ID:
    case ACL_DEV_ATTR_IS_VIRTUAL:
      *value = 0;
      break;
    default:
      return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "aclrtGetDeviceInfo: attribute " + std::to_string(attr) +
                                                        " is not known to the host runtime");
  }
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceCapability(int32_t deviceId, aclrtDevFeatureType, int32_t* value) {
  if (value == nullptr) return fail_null("aclrtGetDeviceCapability", "value");
  if (find_device(deviceId, "aclrtGetDeviceCapability") == nullptr) return last_error();
  *value = ACL_DEV_FEATURE_NOT_SUPPORT;
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceUtilizationRate(int32_t deviceId, aclrtUtilizationInfo* info) {
  if (info == nullptr) return fail_null("aclrtGetDeviceUtilizationRate", "utilizationInfo");
  const Device* device = find_device(deviceId, "aclrtGetDeviceUtilizationRate");
  if (device == nullptr) return last_error();
  bool busy = false;
  for (const auto& stream : streams_of(*device)) busy = busy || !stream->idle();
  // There are no cores to measure: busy or not is all the host knows.
  info->cubeUtilization = info->vectorUtilization = busy ? 100 : 0;
  info->aicpuUtilization = 0;
  info->memoryUtilization = static_cast<int32_t>(100 * device->memory.used() / device->memory.total());
  info->utilizationExtend = nullptr;
  return ACL_SUCCESS;
}

aclError aclrtGetRunMode(aclrtRunMode* runMode) {
  if (runMode == nullptr) return fail_null("aclrtGetRunMode", "runMode");
  *runMode = ACL_HOST;
  return ACL_SUCCESS;
}

aclError aclrtQueryDeviceStatus(int32_t deviceId, aclrtDeviceStatus* deviceStatus) {
  if (deviceStatus == nullptr) return fail_null("aclrtQueryDeviceStatus", "deviceStatus");
  if (find_device(deviceId, "aclrtQueryDeviceStatus") == nullptr) return last_error();
  *deviceStatus = ACL_RT_DEVICE_STATUS_NORMAL;
  return ACL_SUCCESS;
}

namespace {

aclError same_device_id(int32_t from, int32_t* to, const char* function) {
  if (to == nullptr) return fail_null(function, "device id");
  if (find_device(from, function) == nullptr) return last_error();
  *to = from;
  return ACL_SUCCESS;
}

}  // namespace

aclError aclrtGetLogicDevIdByUserDevId(const int32_t userDevid, int32_t* const logicDevId) {
  return same_device_id(userDevid, logicDevId, "aclrtGetLogicDevIdByUserDevId");
}

aclError aclrtGetUserDevIdByLogicDevId(const int32_t logicDevId, int32_t* const userDevid) {
  return same_device_id(logicDevId, userDevid, "aclrtGetUserDevIdByLogicDevId");
}

aclError aclrtGetLogicDevIdByPhyDevId(const int32_t phyDevId, int32_t* const logicDevId) {
  return same_device_id(phyDevId, logicDevId, "aclrtGetLogicDevIdByPhyDevId");
}

aclError aclrtGetPhyDevIdByLogicDevId(const int32_t logicDevId, int32_t* const phyDevId) {
  return same_device_id(logicDevId, phyDevId, "aclrtGetPhyDevIdByLogicDevId");
}

aclError aclrtCtxGetSysParamOpt(aclSysParamOpt opt, int64_t* value) {
  return get_system_option(opt, value, "aclrtCtxGetSysParamOpt");
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt opt, int64_t value) {
  return set_system_option(opt, value, "aclrtCtxSetSysParamOpt");
}
aclError aclrtGetSysParamOpt(aclSysParamOpt opt, int64_t* value) {
  return get_system_option(opt, value, "aclrtGetSysParamOpt");
}
aclError aclrtSetSysParamOpt(aclSysParamOpt opt, int64_t value) {
  return set_system_option(opt, value, "aclrtSetSysParamOpt");
}

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) {
  // The host computes with infinities and NaN; saturation is not modelled.
  if (mode == ACL_RT_OVERFLOW_MODE_INFNAN) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "aclrtSetDeviceSatMode: the host runtime only computes with infinities and NaN (INFNAN)");
}

aclError aclrtGetDeviceSatMode(aclrtFloatOverflowMode* mode) {
  if (mode == nullptr) return fail_null("aclrtGetDeviceSatMode", "mode");
  *mode = ACL_RT_OVERFLOW_MODE_INFNAN;
  return ACL_SUCCESS;
}

// Timeouts of single operators are accepted and not enforced: a CPU kernel cannot be interrupted.
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutWithMs(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actualTimeout) {
  if (actualTimeout != nullptr) *actualTimeout = timeout;
  return ACL_SUCCESS;
}

aclError aclSetCompileopt(aclCompileOpt opt, const char* value) {
  if (value == nullptr) return fail_null("aclSetCompileopt", "value");
  if (opt == ACL_OP_JIT_COMPILE) {
    if (const aclError error = refuse_legacy_operator()) return error;
  }
  std::lock_guard lock(options_mutex);
  compile_options()[opt] = value;
  return ACL_SUCCESS;
}

size_t aclGetCompileoptSize(aclCompileOpt opt) {
  std::lock_guard lock(options_mutex);
  const auto found = compile_options().find(opt);
  return found == compile_options().end() ? 1 : found->second.size() + 1;
}

aclError aclGetCompileopt(aclCompileOpt opt, char* value, size_t length) {
  if (value == nullptr) return fail_null("aclGetCompileopt", "value");
  std::lock_guard lock(options_mutex);
  const auto found = compile_options().find(opt);
  const std::string text = found == compile_options().end() ? "" : found->second;
  if (length < text.size() + 1) return fail(ACL_ERROR_INVALID_PARAM, "aclGetCompileopt: length is too small");
  copy_text(value, length, text);
  return ACL_SUCCESS;
}

aclError aclrtSetDeviceResLimit(int32_t deviceId, aclrtDevResLimitType type, uint32_t value) {
  Device* device = find_device(deviceId, "aclrtSetDeviceResLimit");
  if (device == nullptr) return last_error();
  if (const aclError error = check_limit("aclrtSetDeviceResLimit", type, value)) return error;
  std::lock_guard lock(device->limits_mutex);
  device->core_limits[type] = value;
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceResLimit(int32_t deviceId, aclrtDevResLimitType type, uint32_t* value) {
  Device* device = find_device(deviceId, "aclrtGetDeviceResLimit");
  if (device == nullptr) return last_error();
  if (value == nullptr) return fail_null("aclrtGetDeviceResLimit", "value");
  if (!known_limit(type))
    return fail(ACL_ERROR_INVALID_PARAM, "aclrtGetDeviceResLimit: unknown type of cores");
  std::lock_guard lock(device->limits_mutex);
  *value = limit_in(device->core_limits, type, all_cores(type));
  return ACL_SUCCESS;
}

aclError aclrtResetDeviceResLimit(int32_t deviceId) {
  Device* device = find_device(deviceId, "aclrtResetDeviceResLimit");
  if (device == nullptr) return last_error();
  std::lock_guard lock(device->limits_mutex);
  device->core_limits.clear();
  return ACL_SUCCESS;
}

aclError aclrtSetStreamResLimit(aclrtStream handle, aclrtDevResLimitType type, uint32_t value) {
  const auto stream = find_stream(handle, "aclrtSetStreamResLimit");
  if (!stream) return last_error();
  if (const aclError error = check_limit("aclrtSetStreamResLimit", type, value)) return error;
  std::lock_guard lock(stream->limits_mutex);
  stream->core_limits[type] = value;
  return ACL_SUCCESS;
}

aclError aclrtGetStreamResLimit(aclrtStream handle, aclrtDevResLimitType type, uint32_t* value) {
  const auto stream = find_stream(handle, "aclrtGetStreamResLimit");
  if (!stream) return last_error();
  uint32_t device_limit = 0;
  if (const aclError error = aclrtGetDeviceResLimit(stream->device.id, type, &device_limit)) return error;
  if (value == nullptr) return fail_null("aclrtGetStreamResLimit", "value");
  std::lock_guard lock(stream->limits_mutex);
  *value = limit_in(stream->core_limits, type, device_limit);
  return ACL_SUCCESS;
}

aclError aclrtResetStreamResLimit(aclrtStream handle) {
  const auto stream = find_stream(handle, "aclrtResetStreamResLimit");
  if (!stream) return last_error();
  std::lock_guard lock(stream->limits_mutex);
  stream->core_limits.clear();
  return ACL_SUCCESS;
}

aclError aclrtUseStreamResInCurrentThread(aclrtStream handle) {
  const auto stream = find_stream(handle, "aclrtUseStreamResInCurrentThread");
  if (!stream) return last_error();
  std::lock_guard lock(stream->limits_mutex);
  thread_limits = stream->core_limits;
  return ACL_SUCCESS;
}

aclError aclrtUnuseStreamResInCurrentThread(aclrtStream) {
  thread_limits.clear();
  return ACL_SUCCESS;
}

aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t* value) {
  if (value == nullptr) return fail_null("aclrtGetResInCurrentThread", "value");
  Context* context = require_context("aclrtGetResInCurrentThread");
  if (context == nullptr) return last_error();
  uint32_t device_limit = 0;
  if (const aclError error = aclrtGetDeviceResLimit(context->device.id, type, &device_limit)) return error;
  *value = limit_in(thread_limits, type, device_limit);
  return ACL_SUCCESS;
}
