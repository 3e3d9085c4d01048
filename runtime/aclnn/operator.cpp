#include "runtime/aclnn/operator.h"

#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/core/Formatting.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <future>
#include <optional>
#include <sstream>

#include "runtime/acl/bounds.h"

namespace aclnn {
namespace {

/// The bytes that a view can touch: from its lowest to its highest element.
host_runtime::MemoryAccess extent(const Operand& operand) {
  const Tensor& t = *operand.tensor;
  if (t.numel() == 0) return {t.storage, 0, operand.mode};
  const auto item = static_cast<int64_t>(t.itemsize());
  if (!t.is_plain()) {
    int64_t count = 1;
    for (int64_t size : t.storage_shape) count *= size;
    return {t.storage, static_cast<size_t>(count * item), operand.mode, operand.whole};
  }
  int64_t low = t.offset, high = t.offset;
  for (int64_t i = 0; i < t.dim(); ++i) {
    const int64_t reach = (t.shape[i] - 1) * t.strides[i];
    (reach < 0 ? low : high) += reach;
  }
  return {static_cast<const char*>(t.storage) + low * item, static_cast<size_t>((high - low + 1) * item),
          operand.mode, operand.whole && high - low + 1 == t.numel()};
}

void print(std::ostream& out, const Attribute& attribute) {
  out << '"' << attribute.name << "\": ";
  std::visit(
      [&](const auto& value) {
        using T = std::decay_t<decltype(value)>;
        if constexpr (std::is_same_v<T, c10::intrusive_ptr<aclScalar>>) {
          out << '"' << value->value << '"';
        } else if constexpr (std::is_same_v<T, c10::intrusive_ptr<aclIntArray>>) {
          out << describe(value->values);
        } else if constexpr (std::is_same_v<T, std::string>) {
          out << '"' << value << '"';
        } else if constexpr (std::is_same_v<T, bool>) {
          out << (value ? "true" : "false");
        } else {
          out << value;
        }
      },
      attribute.value);
}

/// ATen's modes and settings of a thread that nobody has changed any of.
const at::ThreadLocalState& state_of_new_thread() {
  static const at::ThreadLocalState state =
      std::async(std::launch::async, [] { return at::ThreadLocalState(); }).get();
  return state;
}

}  // namespace

void Operator::run() {
  std::optional<host_runtime::bounds::OnlyThese> addressable;
  if constexpr (host_runtime::bounds::kKept) {
    auto touched = accesses();
    if (workspace_ != nullptr)
      touched.push_back(
          {workspace_->address, workspace_bytes_, host_runtime::MemoryAccess::Mode::kReadWrite});
    addressable.emplace(touched);
  }
  if (workspace_ != nullptr) host_runtime::poison(workspace_->address, workspace_bytes_);
  try {
    if (calls_aten_) {
      // A stream's thread is none of ATen's: until it is told, its products use every core, whatever
      // at::set_num_threads says.
      at::internal::lazy_init_num_threads();
      std::optional<at::ThreadLocalStateGuard> as_on_own_thread;
      if (host_runtime::on_borrowed_thread()) as_on_own_thread.emplace(state_of_new_thread());
      // Device tensors are plain CPU tensors to ATen here: no autograd, no version counters.
      at::AutoDispatchBelowADInplaceOrView guard;
      work_();
    } else {
      work_();
    }
  } catch (const host_runtime::TaskError&) {
    throw;
  } catch (const c10::Error& error) {
    throw host_runtime::TaskError(kKernelFailed, std::string(name_) + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    throw host_runtime::TaskError(kKernelFailed, std::string(name_) + ": " + error.what());
  }
}

std::vector<host_runtime::MemoryAccess> Operator::accesses() const {
  std::vector<host_runtime::MemoryAccess> result;
  result.reserve(operands_.size());
  for (const Operand& operand : operands_) result.push_back(extent(operand));
  return result;
}

std::string Operator::arguments_json() const {
  std::ostringstream out;
  const char* separator = "{";
  for (const Operand& operand : operands_) {
    out << separator << '"' << operand.name << "\": {\"dtype\": \"" << dtype_name(operand.tensor->dtype)
        << "\", \"shape\": " << describe(operand.tensor->shape)
        << ", \"stride\": " << describe(operand.tensor->strides)
        << ", \"format\": " << static_cast<int>(operand.tensor->format) << ", \"address\": \""
        << operand.tensor->storage << "\"}";
    separator = ", ";
  }
  for (const Attribute& attribute : attributes_) {
    out << separator;
    print(out, attribute);
    separator = ", ";
  }
  out << (*separator == '{' ? "{}" : "}");
  return out.str();
}

void Call::tensors(const char* argument, const aclTensorList* value, Mode mode, bool optional) {
  if (value == nullptr) {
    if (!optional) null_argument(argument);
    return;
  }
  for (const TensorRef& element : value->tensors) {
    if (element) operator_->operands_.push_back({argument, element, mode});
  }
}

std::shared_ptr<Workspace> Call::workspace(uint64_t bytes) {
  workspace_bytes = bytes;
  operator_->workspace_bytes_ = bytes;
  operator_->workspace_ = std::make_shared<Workspace>();
  return operator_->workspace_;
}

void Operator::bring_workspace(void* address, uint64_t bytes) {
  if (workspace_ == nullptr) return;
  if (address == nullptr || bytes < workspace_bytes_)
    throw ArgumentError(kParamInvalid, std::string(name_) + ": the workspace has " + std::to_string(bytes) +
                                           " bytes, but GetWorkspaceSize asked for " +
                                           std::to_string(workspace_bytes_));
  workspace_->address = address;
}

void Call::refuse(const std::string& argument, const std::string& rule) const {
  throw ArgumentError(kParamInvalid, std::string(name()) + ": argument `" + argument + "` " + rule);
}

void Call::null_argument(const char* argument) const {
  throw ArgumentError(kParamNullptr,
                      std::string(name()) + ": argument `" + argument + "` is required and is null");
}

bool Call::all_plain() const {
  for (const Operand& operand : operator_->operands_) {
    if (!operand.tensor->is_plain()) return false;
  }
  return true;
}

void Call::require_plain() const {
  for (const Operand& operand : operator_->operands_) {
    if (!operand.tensor->is_plain()) {
      refuse(operand.name,
             "has format " + std::to_string(operand.tensor->format) +
                 ", which this operator does not read: cast it with torch_npu.npu_format_cast(t, 2)");
    }
  }
}

bool Call::take(Work work) {
  operator_->work_ = std::move(work);
  return static_cast<bool>(operator_->work_);
}

void Call::take_aten(Work work) {
  operator_->work_ = std::move(work);
  operator_->calls_aten_ = true;
}

int refused(const char* name) {
  try {
    throw;
  } catch (const ArgumentError& error) {
    return host_runtime::fail(error.code, error.what());
  } catch (const c10::Error& error) {
    return host_runtime::fail(kParamInvalid, std::string(name) + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    return host_runtime::fail(kInnerError, std::string(name) + ": " + error.what());
  }
}

int publish(std::shared_ptr<Operator> operation, uint64_t bytes, uint64_t* workspace,
            aclOpExecutor** executor) {
  if (workspace == nullptr || executor == nullptr) {
    return host_runtime::fail(kParamNullptr, operation->name() +
                                                 "GetWorkspaceSize: workspaceSize and executor must "
                                                 "not be null");
  }
  *workspace = bytes;
  *executor = new aclOpExecutor{std::move(operation)};
  return 0;
}

int execute(const char* name, void* workspace, uint64_t bytes, aclOpExecutor* executor, aclrtStream stream) {
  if (executor == nullptr) {
    return host_runtime::fail(kParamNullptr, std::string(name) + ": executor is null; call " + name +
                                                 "GetWorkspaceSize first, and use its executor once");
  }
  std::unique_ptr<aclOpExecutor> owned(executor->repeatable ? nullptr : executor);
  try {
    executor->operation->bring_workspace(workspace, bytes);
  } catch (const ArgumentError& error) {
    return host_runtime::fail(error.code, error.what());
  }
  return host_runtime::submit(stream, executor->operation);
}

std::string describe(c10::ArrayRef<int64_t> dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

std::string describe(const Tensor& tensor) { return dtype_name(tensor.dtype) + describe(tensor.shape); }

}  // namespace aclnn

extern "C" {

HOST_RUNTIME_API int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  delete executor;
  return 0;
}

HOST_RUNTIME_API int aclSetAclOpExecutorRepeatable(aclOpExecutor* executor) {
  if (executor == nullptr) {
    return host_runtime::fail(aclnn::kParamNullptr,
                              "aclSetAclOpExecutorRepeatable: executor must not be null");
  }
  executor->repeatable = true;
  return 0;
}

}  // extern "C"
