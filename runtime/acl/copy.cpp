// Copies and fills, blocking and on streams.
#include <cstring>
#include <optional>
#include <vector>

#include "runtime/acl/bounds.h"
#include "runtime/acl/capture.h"
#include "runtime/acl/check.h"
#include "runtime/acl/counters.h"
#include "runtime/acl/memory.h"
#include "runtime/acl/stream.h"

namespace host_runtime {
namespace {

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

/// `height` rows of `width` bytes, `destination_pitch` and `source_pitch` bytes apart.
struct CopyShape {
  void* destination;
  size_t destination_pitch;
  const void* source;
  size_t source_pitch;
  size_t width;
  size_t height;
};

void copy_rows(const CopyShape& shape) {
  const auto addressable = bounds::lifted();
  auto* to = static_cast<char*>(shape.destination);
  auto* from = static_cast<const char*>(shape.source);
  for (size_t row = 0; row < shape.height; ++row) {
    std::memmove(to + row * shape.destination_pitch, from + row * shape.source_pitch, shape.width);
  }
}

size_t extent(const CopyShape& shape, size_t pitch) {
  return shape.height == 0 ? 0 : (shape.height - 1) * pitch + shape.width;
}

/// Copied sooner than a thread is awake.
constexpr size_t kBriefBytes = 4096;

class CopyTask final : public Task, public BriefTask {
 public:
  CopyTask(const CopyShape& shape, aclrtMemcpyKind kind) : shape_(shape), kind_(kind) {}

  /// In the checking mode, for one that is queued (a captured copy reads whatever is there at each replay).
  void watch(bool from_pinned, bool to_pinned) {
    if (from_pinned && shape_.height == 1) fingerprint_ = check::fingerprint(shape_.source, shape_.width);
    watches_source_ = from_pinned && shape_.height == 1;
    poisons_destination_ = to_pinned && shape_.height == 1;
  }

  void run() override {
    if (watches_source_ && check::fingerprint(shape_.source, shape_.width) != fingerprint_) {
      check::source_changed(name(), shape_.source);
    }
    if (poisons_destination_) {
      // Who reads before waiting for the copy sees NaN instead of, by luck, the right values.
      poison(shape_.destination, shape_.width);
      std::this_thread::sleep_for(std::chrono::microseconds(settings().delay_us));
    }
    copy_rows(shape_);
  }
  bool brief() const override { return shape_.width * shape_.height <= kBriefBytes; }
  std::string name() const override { return shape_.height == 1 ? "aclrtMemcpyAsync" : "aclrtMemcpy2dAsync"; }
  std::vector<MemoryAccess> accesses() const override {
    return {{shape_.source, extent(shape_, shape_.source_pitch), MemoryAccess::Mode::kRead},
            {shape_.destination, extent(shape_, shape_.destination_pitch), MemoryAccess::Mode::kWrite}};
  }
  std::string arguments_json() const override {
    return "{\"bytes\": " + std::to_string(shape_.width * shape_.height) +
           ", \"kind\": " + std::to_string(kind_) + "}";
  }

 private:
  CopyShape shape_;
  aclrtMemcpyKind kind_;
  uint64_t fingerprint_ = 0;
  bool watches_source_ = false;
  bool poisons_destination_ = false;
};

class FillTask final : public Task {
 public:
  FillTask(void* address, int32_t value, size_t bytes) : address_(address), value_(value), bytes_(bytes) {}
  void run() override { fill(address_, value_, bytes_); }
  std::string name() const override { return "aclrtMemsetAsync"; }
  std::vector<MemoryAccess> accesses() const override {
    return {{address_, bytes_, MemoryAccess::Mode::kWrite}};
  }
  std::string arguments_json() const override {
    return "{\"bytes\": " + std::to_string(bytes_) + ", \"value\": " + std::to_string(value_) + "}";
  }
  static void fill(void* address, int32_t value, size_t bytes) {
    const auto addressable = bounds::lifted();
    if ((value & 0xFF) == 0) {
      zero_fill(address, bytes);
    } else {
      std::memset(address, value, bytes);
    }
  }

 private:
  void* address_;
  int32_t value_;
  size_t bytes_;
};

enum class Place { kDevice, kPinned, kPageable };

/// What an address given by the user belongs to, looked up once: nothing, if it is pageable.
struct Located {
  const void* pointer;
  std::optional<Allocation> allocation;

  explicit Located(const void* address) : pointer(address), allocation(MemoryMap::instance().find(address)) {}

  Place place() const {
    if (!allocation) return Place::kPageable;
    return allocation->on_device() ? Place::kDevice : Place::kPinned;
  }
};

/// Both sides of a copy.
struct Sides {
  Located destination, source;

  explicit Sides(const CopyShape& shape) : destination(shape.destination), source(shape.source) {}
};

aclError check_end(const char* function, const char* which, const Located& located, size_t bytes) {
  const auto& allocation = located.allocation;
  if (!allocation || allocation->contains(reinterpret_cast<uintptr_t>(located.pointer), bytes)) {
    return ACL_SUCCESS;
  }
  // Neighbouring mappings of one reservation (expandable segments) form one range for their user.
  if (allocation->kind == Allocation::Kind::kMapped) return ACL_SUCCESS;
  return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": " + std::to_string(bytes) + " bytes from " +
                                           which + " reach beyond the end of its allocation of " +
                                           std::to_string(allocation->bytes) + " bytes");
}

/// Whether the side that `kind` calls a device's is one.
aclError check_kind(const char* function, const Sides& sides, aclrtMemcpyKind kind) {
  if (kind < ACL_MEMCPY_HOST_TO_HOST || kind > ACL_MEMCPY_INTER_DEVICE_TO_DEVICE) {
    return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": unknown kind " + std::to_string(kind));
  }
  const bool to_device = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  const bool from_device = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  if (to_device && sides.destination.place() == Place::kPageable) {
    return fail(ACL_ERROR_INVALID_PARAM,
                std::string(function) + ": kind says that dst is in a device's memory; it is not");
  }
  if (from_device && sides.source.place() == Place::kPageable) {
    return fail(ACL_ERROR_INVALID_PARAM,
                std::string(function) + ": kind says that src is in a device's memory; it is not");
  }
  return ACL_SUCCESS;
}

aclError check_copy(const char* function, const CopyShape& shape, const Sides& sides, size_t room,
                    aclrtMemcpyKind kind) {
  if (shape.destination == nullptr) return fail_null(function, "dst");
  if (shape.source == nullptr) return fail_null(function, "src");
  const size_t needed = extent(shape, shape.destination_pitch);
  if (needed > room) {
    return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": " + std::to_string(needed) +
                                             " bytes do not fit the destination's " + std::to_string(room));
  }
  if (const aclError error = check_kind(function, sides, kind)) return error;
  if (const aclError error = check_end(function, "dst", sides.destination, needed)) return error;
  return check_end(function, "src", sides.source, extent(shape, shape.source_pitch));
}

aclError copy_now(const char* function, const CopyShape& shape, size_t room, aclrtMemcpyKind kind) {
  return guarded(function, [&] {
    if (const aclError error = check_copy(function, shape, Sides(shape), room, kind)) return error;
    if (require_context(function) == nullptr) return last_error();
    if (const aclError error = refuse_unsafe(function)) return error;
    count(Counter::kHostSynchronizations);
    const trace::Call call(function);
    check::host_access(function, shape.source, extent(shape, shape.source_pitch), shape.destination,
                       extent(shape, shape.destination_pitch));
    copy_rows(shape);
    return ACL_SUCCESS;
  });
}

/// A device cannot reach host memory that is not pinned. As CANN does, such a copy waits for the stream and
/// then copies before the call returns: it counts as a host synchronisation.
aclError copy_staged(const char* function, const CopyShape& shape, Stream& stream) {
  if (const aclError error = refuse_staged_copy(stream, function)) return error;
  if (const aclError error = stream.synchronize(std::nullopt, function)) return error;
  check::host_access(function, shape.source, extent(shape, shape.source_pitch), shape.destination,
                     extent(shape, shape.destination_pitch));
  copy_rows(shape);
  return ACL_SUCCESS;
}

aclError copy_async(const char* function, const CopyShape& shape, size_t room, aclrtMemcpyKind kind,
                    aclrtStream stream_handle) {
  return guarded(function, [&] {
    const Sides sides(shape);
    if (const aclError error = check_copy(function, shape, sides, room, kind)) return error;
    const auto stream = find_stream(stream_handle, function);
    if (!stream) return last_error();
    const Place from = sides.source.place(), to = sides.destination.place();
    if (from == Place::kPageable || to == Place::kPageable) return copy_staged(function, shape, *stream);
    auto task = std::make_shared<CopyTask>(shape, kind);
    if (check::on() && !stream->diverted.load()) {
      task->watch(from == Place::kPinned, to == Place::kPinned);
    }
    return submit_to(*stream, std::move(task));
  });
}

aclError fill_now(const char* function, void* address, size_t room, int32_t value, size_t bytes) {
  return guarded(function, [&] {
    if (address == nullptr) return fail_null(function, "devPtr");
    if (bytes > room)
      return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": count is greater than maxCount");
    if (const aclError error = check_end(function, "devPtr", Located(address), bytes)) return error;
    if (const aclError error = refuse_unsafe(function)) return error;
    count(Counter::kHostSynchronizations);
    const trace::Call call(function);
    check::host_access(function, nullptr, 0, address, bytes);
    FillTask::fill(address, value, bytes);
    return ACL_SUCCESS;
  });
}

aclError fill_async(const char* function, void* address, size_t room, int32_t value, size_t bytes,
                    aclrtStream stream) {
  return guarded(function, [&] {
    if (address == nullptr) return fail_null(function, "devPtr");
    if (bytes > room)
      return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": count is greater than maxCount");
    if (const aclError error = check_end(function, "devPtr", Located(address), bytes)) return error;
    const auto found = find_stream(stream, function);
    if (!found) return last_error();
    return submit_to(*found, std::make_shared<FillTask>(address, value, bytes));
  });
}

CopyShape flat(void* dst, const void* src, size_t bytes) { return {dst, bytes, src, bytes, bytes, 1}; }

}  // namespace
}  // namespace host_runtime

using namespace host_runtime;

aclError aclrtMemcpy(void* dst, size_t destMax, const void* src, size_t count, aclrtMemcpyKind kind) {
  return copy_now("aclrtMemcpy", flat(dst, src, count), destMax, kind);
}

aclError aclrtMemcpyAsync(void* dst, size_t destMax, const void* src, size_t count, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  return copy_async("aclrtMemcpyAsync", flat(dst, src, count), destMax, kind, stream);
}

aclError aclrtMemcpyAsyncWithCondition(void* dst, size_t destMax, const void* src, size_t count,
                                       aclrtMemcpyKind kind, aclrtStream stream) {
  return copy_async("aclrtMemcpyAsyncWithCondition", flat(dst, src, count), destMax, kind, stream);
}

aclError aclrtMemcpy2d(void* dst, size_t dpitch, const void* src, size_t spitch, size_t width, size_t height,
                       aclrtMemcpyKind kind) {
  if (width > dpitch || width > spitch)
    return fail(ACL_ERROR_INVALID_PARAM, "aclrtMemcpy2d: width is greater than a pitch");
  return copy_now("aclrtMemcpy2d", {dst, dpitch, src, spitch, width, height}, dpitch * height, kind);
}

aclError aclrtMemcpy2dAsync(void* dst, size_t dpitch, const void* src, size_t spitch, size_t width,
                            size_t height, aclrtMemcpyKind kind, aclrtStream stream) {
  if (width > dpitch || width > spitch) {
    return fail(ACL_ERROR_INVALID_PARAM, "aclrtMemcpy2dAsync: width is greater than a pitch");
  }
  return copy_async("aclrtMemcpy2dAsync", {dst, dpitch, src, spitch, width, height}, dpitch * height, kind,
                    stream);
}

aclError aclrtMemset(void* devPtr, size_t maxCount, int32_t value, size_t count) {
  return fill_now("aclrtMemset", devPtr, maxCount, value, count);
}

aclError aclrtMemsetAsync(void* devPtr, size_t maxCount, int32_t value, size_t count, aclrtStream stream) {
  return fill_async("aclrtMemsetAsync", devPtr, maxCount, value, count, stream);
}

namespace {

/// Calls `copy(i)` for each copy of a batch; writes the index of the first that fails.
template <typename Copy>
aclError for_each_copy(const char* function, void** dsts, size_t* destMaxs, void** srcs, size_t* sizes,
                       size_t number, size_t* failIndex, Copy copy) {
  if (dsts == nullptr || destMaxs == nullptr || srcs == nullptr || sizes == nullptr)
    return fail_null(function, "an array");
  if (number == 0) return fail(ACL_ERROR_INVALID_PARAM, std::string(function) + ": numBatches is 0");
  for (size_t i = 0; i < number; ++i) {
    if (const aclError error = copy(i)) {
      if (failIndex != nullptr) *failIndex = i;
      return error;
    }
  }
  if (failIndex != nullptr) *failIndex = SIZE_MAX;
  return ACL_SUCCESS;
}

}  // namespace

aclError aclrtMemcpyBatch(void** dsts, size_t* destMaxs, void** srcs, size_t* sizes, size_t numBatches,
                          aclrtMemcpyBatchAttr*, size_t*, size_t, size_t* failIndex) {
  return for_each_copy("aclrtMemcpyBatch", dsts, destMaxs, srcs, sizes, numBatches, failIndex, [&](size_t i) {
    return copy_now("aclrtMemcpyBatch", flat(dsts[i], srcs[i], sizes[i]), destMaxs[i], ACL_MEMCPY_DEFAULT);
  });
}

aclError aclrtMemcpyBatchV2(void** dsts, size_t* destMaxs, void** srcs, size_t* sizes, size_t numBatches,
                            aclrtMemcpyBatchAttr* attrs, size_t* attrsIndexes, size_t numAttrs) {
  return aclrtMemcpyBatch(dsts, destMaxs, srcs, sizes, numBatches, attrs, attrsIndexes, numAttrs, nullptr);
}

aclError aclrtMemcpyBatchAsync(void** dsts, size_t* destMaxs, void** srcs, size_t* sizes, size_t numBatches,
                               aclrtMemcpyBatchAttr*, size_t*, size_t, size_t* failIndex,
                               aclrtStream stream) {
  return for_each_copy("aclrtMemcpyBatchAsync", dsts, destMaxs, srcs, sizes, numBatches, failIndex,
                       [&](size_t i) {
                         return copy_async("aclrtMemcpyBatchAsync", flat(dsts[i], srcs[i], sizes[i]),
                                           destMaxs[i], ACL_MEMCPY_DEFAULT, stream);
                       });
}

aclError aclrtMemcpyBatchAsyncV2(void** dsts, size_t* destMaxs, void** srcs, size_t* sizes, size_t numBatches,
                                 aclrtMemcpyBatchAttr* attrs, size_t* attrsIndexes, size_t numAttrs,
                                 aclrtStream stream) {
  return aclrtMemcpyBatchAsync(dsts, destMaxs, srcs, sizes, numBatches, attrs, attrsIndexes, numAttrs,
                               nullptr, stream);
}
