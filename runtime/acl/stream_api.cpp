// The C interface of streams.
#include <cstring>

#include "runtime/acl/capture.h"
#include "runtime/acl/counters.h"
#include "runtime/acl/stream.h"

using namespace host_runtime;

namespace {

constexpr uint32_t kLowestPriority = 7;
constexpr uint32_t kKnownFlags = ACL_STREAM_FAST_LAUNCH | ACL_STREAM_FAST_SYNC | ACL_STREAM_PERSISTENT |
                                 ACL_STREAM_HUGE | ACL_STREAM_CPU_SCHEDULE | ACL_STREAM_DEVICE_USE_ONLY;

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

aclError create_stream(aclrtStream* stream, uint32_t priority, uint32_t flags, const char* function) {
  return guarded(function, [&] {
    if (stream == nullptr) return fail_null(function, "stream");
    if (priority > kLowestPriority) {
      return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": priority " + std::to_string(priority) +
                                               " is not between 0 (highest) and 7 (lowest)");
    }
    if ((flags & ~kKnownFlags) != 0) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  std::string(function) + ": unknown flags " + std::to_string(flags & ~kKnownFlags));
    }
    Context* context = require_context(function);
    if (context == nullptr) return last_error();
    const auto created = Stream::create(context->device, Stream::Kind::kExplicit, priority, flags);
    if (!created) return last_error();
    *stream = created.get();
    return ACL_SUCCESS;
  });
}

aclError destroy_stream(aclrtStream handle, bool force, const char* function) {
  return guarded(function, [&] {
    if (handle == nullptr) return fail_null(function, "stream");
    const auto stream = find_stream(handle, function);
    if (!stream) return last_error();
    if (stream->kind == Stream::Kind::kDefault) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  std::string(function) + ": the default stream goes with its context");
    }
    if (const aclError error = refuse_capturing(*stream, function)) return error;
    if (force) stream->abort(ACL_ERROR_RT_STREAM_ABORT, "aclrtDestroyStreamForce");
    forget_stream(stream.get());
    stream->close();
    return ACL_SUCCESS;
  });
}

aclError synchronize_stream(aclrtStream handle, int64_t timeout_ms, const char* function) {
  return guarded(function, [&] {
    const auto stream = find_stream(handle, function);
    if (!stream) return last_error();
    if (const aclError error = refuse_capturing(*stream, function)) return error;
    return stream->synchronize(deadline_after_ms(timeout_ms), function);
  });
}

aclError synchronize_device(int64_t timeout_ms, const char* function) {
  return guarded(function, [&] {
    Context* context = require_context(function);
    if (context == nullptr) return last_error();
    if (const aclError error = refuse_device_wait(context->device, function)) return error;
    const Deadline deadline = deadline_after_ms(timeout_ms);
    aclError result = ACL_SUCCESS;
    for (const auto& stream : streams_of(context->device)) {
      const aclError error = stream->synchronize(deadline, function);
      if (result == ACL_SUCCESS) result = error;
    }
    return result;
  });
}

}  // namespace

aclError aclrtCreateStream(aclrtStream* stream) { return create_stream(stream, 0, 0, "aclrtCreateStream"); }

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t priority, uint32_t flag) {
  return create_stream(stream, priority, flag, "aclrtCreateStreamWithConfig");
}

aclrtStreamConfigHandle* aclrtCreateStreamConfigHandle(void) {
  return new (std::nothrow) aclrtStreamConfigHandle{};
}

aclError aclrtDestroyStreamConfigHandle(aclrtStreamConfigHandle* handle) {
  if (handle == nullptr) return fail_null("aclrtDestroyStreamConfigHandle", "handle");
  delete handle;
  return ACL_SUCCESS;
}

aclError aclrtSetStreamConfigOpt(aclrtStreamConfigHandle* handle, aclrtStreamConfigAttr attr,
                                 const void* attrValue, size_t valueSize) {
  const char* const function = "aclrtSetStreamConfigOpt";
  if (handle == nullptr) return fail_null(function, "handle");
  if (attrValue == nullptr) return fail_null(function, "attrValue");
  void* target = nullptr;
  size_t size = sizeof(size_t);
  switch (attr) {
    case ACL_RT_STREAM_WORK_ADDR_PTR:
      target = &handle->workptr;
      break;
    case ACL_RT_STREAM_WORK_SIZE:
      target = &handle->workSize;
      break;
    case ACL_RT_STREAM_FLAG:
      target = &handle->flag;
      break;
    case ACL_RT_STREAM_PRIORITY:
      target = &handle->priority;
      size = sizeof handle->priority;
      break;
  }
  if (target == nullptr || valueSize != size) {
    return fail(ACL_ERROR_INVALID_PARAM,
                std::string(function) + ": unknown attribute, or a value of the wrong size");
  }
  std::memcpy(target, attrValue, size);
  return ACL_SUCCESS;
}

aclError aclrtCreateStreamV2(aclrtStream* stream, const aclrtStreamConfigHandle* handle) {
  if (handle == nullptr) return fail_null("aclrtCreateStreamV2", "handle");
  return create_stream(stream, handle->priority, static_cast<uint32_t>(handle->flag), "aclrtCreateStreamV2");
}

aclError aclrtDestroyStream(aclrtStream stream) {
  return destroy_stream(stream, false, "aclrtDestroyStream");
}

aclError aclrtDestroyStreamForce(aclrtStream stream) {
  return destroy_stream(stream, true, "aclrtDestroyStreamForce");
}

aclError aclrtSynchronizeStream(aclrtStream stream) {
  return synchronize_stream(stream, -1, "aclrtSynchronizeStream");
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) {
  return synchronize_stream(stream, timeout, "aclrtSynchronizeStreamWithTimeout");
}

aclError aclrtSynchronizeDevice(void) { return synchronize_device(-1, "aclrtSynchronizeDevice"); }

aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
  return synchronize_device(timeout, "aclrtSynchronizeDeviceWithTimeout");
}

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  return guarded("aclrtStreamQuery", [&] {
    if (status == nullptr) return fail_null("aclrtStreamQuery", "status");
    const auto stream = find_stream(handle, "aclrtStreamQuery");
    if (!stream) return last_error();
    if (const aclError error = refuse_capturing(*stream, "aclrtStreamQuery")) return error;
    if (const auto failure = stream->failure())
      return fail(failure->code, "aclrtStreamQuery: " + failure->message);
    *status = stream->idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    return ACL_SUCCESS;
  });
}

aclError aclrtStreamAbort(aclrtStream handle) {
  return guarded("aclrtStreamAbort", [&] {
    const auto stream = find_stream(handle, "aclrtStreamAbort");
    if (!stream) return last_error();
    stream->abort(ACL_ERROR_RT_STREAM_ABORT, "aclrtStreamAbort");
    return ACL_SUCCESS;
  });
}

aclError aclrtDeviceTaskAbort(int32_t deviceId, uint32_t) {
  return guarded("aclrtDeviceTaskAbort", [&] {
    Device* device = find_device(deviceId, "aclrtDeviceTaskAbort");
    if (device == nullptr) return last_error();
    for (const auto& stream : streams_of(*device))
      stream->abort(ACL_ERROR_RT_DEVICE_TASK_ABORT, "aclrtDeviceTaskAbort");
    return ACL_SUCCESS;
  });
}

aclError aclrtStreamGetId(aclrtStream handle, int32_t* streamId) {
  if (streamId == nullptr) return fail_null("aclrtStreamGetId", "streamId");
  const auto stream = find_stream(handle, "aclrtStreamGetId");
  if (!stream) return last_error();
  *streamId = stream->id;
  return ACL_SUCCESS;
}

aclError aclrtStreamGetPriority(aclrtStream handle, uint32_t* priority) {
  if (priority == nullptr) return fail_null("aclrtStreamGetPriority", "priority");
  const auto stream = find_stream(handle, "aclrtStreamGetPriority");
  if (!stream) return last_error();
  *priority = stream->priority.load();
  return ACL_SUCCESS;
}

aclError aclrtStreamGetFlags(aclrtStream handle, uint32_t* flags) {
  if (flags == nullptr) return fail_null("aclrtStreamGetFlags", "flags");
  const auto stream = find_stream(handle, "aclrtStreamGetFlags");
  if (!stream) return last_error();
  *flags = stream->flags;
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetStreamPriorityRange(int32_t* leastPriority, int32_t* greatestPriority) {
  if (leastPriority == nullptr) return fail_null("aclrtDeviceGetStreamPriorityRange", "leastPriority");
  if (greatestPriority == nullptr) return fail_null("aclrtDeviceGetStreamPriorityRange", "greatestPriority");
  *leastPriority = static_cast<int32_t>(kLowestPriority);
  *greatestPriority = 0;
  return ACL_SUCCESS;
}

aclError aclrtGetStreamAvailableNum(uint32_t* streamCount) {
  if (streamCount == nullptr) return fail_null("aclrtGetStreamAvailableNum", "streamCount");
  Context* context = require_context("aclrtGetStreamAvailableNum");
  if (context == nullptr) return last_error();
  *streamCount = context->device.streams.available();
  return ACL_SUCCESS;
}

aclError aclrtSetStreamFailureMode(aclrtStream handle, uint64_t mode) {
  const char* const function = "aclrtSetStreamFailureMode";
  if (handle == nullptr) {
    return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": not for the default stream");
  }
  if (mode != ACL_CONTINUE_ON_FAILURE && mode != ACL_STOP_ON_FAILURE) {
    return fail(ACL_ERROR_INVALID_PARAM, std::string(function) +
                                             ": mode is neither ACL_CONTINUE_ON_FAILURE nor "
                                             "ACL_STOP_ON_FAILURE");
  }
  const auto stream = find_stream(handle, function);
  if (!stream) return last_error();
  stream->stop_on_failure.store(mode == ACL_STOP_ON_FAILURE);
  return ACL_SUCCESS;
}

aclError aclrtSetStreamOverflowSwitch(aclrtStream handle, uint32_t flag) {
  const auto stream = find_stream(handle, "aclrtSetStreamOverflowSwitch");
  if (!stream) return last_error();
  stream->overflow_switch.store(flag);
  return ACL_SUCCESS;
}

aclError aclrtGetStreamOverflowSwitch(aclrtStream handle, uint32_t* flag) {
  if (flag == nullptr) return fail_null("aclrtGetStreamOverflowSwitch", "flag");
  const auto stream = find_stream(handle, "aclrtGetStreamOverflowSwitch");
  if (!stream) return last_error();
  *flag = stream->overflow_switch.load();
  return ACL_SUCCESS;
}

aclError aclrtSetStreamAttribute(aclrtStream handle, aclrtStreamAttr attribute, aclrtStreamAttrValue* value) {
  const char* const function = "aclrtSetStreamAttribute";
  if (value == nullptr) return fail_null(function, "value");
  const auto stream = find_stream(handle, function);
  if (!stream) return last_error();
  switch (attribute) {
    case ACL_STREAM_ATTR_FAILURE_MODE:
      return aclrtSetStreamFailureMode(handle, value->failureMode);
    case ACL_STREAM_ATTR_FLOAT_OVERFLOW_CHECK:
      stream->overflow_switch.store(value->overflowSwitch);
      break;
    case ACL_STREAM_ATTR_USER_CUSTOM_TAG:
      stream->custom_tag.store(value->userCustomTag);
      break;
    case ACL_STREAM_ATTR_CACHE_OP_INFO:
      stream->cache_operator_info.store(value->cacheOpInfoSwitch);
      break;
    case ACL_STREAM_ATTR_PRIORITY:
      stream->priority.store(value->streamPriority);
      break;
    default:
      return fail(ACL_ERROR_RT_PARAM_INVALID,
                  std::string(function) + ": unknown attribute " + std::to_string(attribute));
  }
  return ACL_SUCCESS;
}

aclError aclrtGetStreamAttribute(aclrtStream handle, aclrtStreamAttr attribute, aclrtStreamAttrValue* value) {
  const char* const function = "aclrtGetStreamAttribute";
  if (value == nullptr) return fail_null(function, "value");
  const auto stream = find_stream(handle, function);
  if (!stream) return last_error();
  switch (attribute) {
    case ACL_STREAM_ATTR_FAILURE_MODE:
      value->failureMode = stream->stop_on_failure.load() ? ACL_STOP_ON_FAILURE : ACL_CONTINUE_ON_FAILURE;
      break;
    case ACL_STREAM_ATTR_FLOAT_OVERFLOW_CHECK:
      value->overflowSwitch = stream->overflow_switch.load();
      break;
    case ACL_STREAM_ATTR_USER_CUSTOM_TAG:
      value->userCustomTag = stream->custom_tag.load();
      break;
    case ACL_STREAM_ATTR_CACHE_OP_INFO:
      value->cacheOpInfoSwitch = stream->cache_operator_info.load();
      break;
    case ACL_STREAM_ATTR_PRIORITY:
      value->streamPriority = stream->priority.load();
      break;
    default:
      return fail(ACL_ERROR_RT_PARAM_INVALID,
                  std::string(function) + ": unknown attribute " + std::to_string(attribute));
  }
  return ACL_SUCCESS;
}
