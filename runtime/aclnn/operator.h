// What stands behind an aclOpExecutor: phase 1 (GetWorkspaceSize) checks arguments and prepares an Operator,
// phase 2 hands it to a stream. generate.py writes the entry points; a Call is what they fill in.
#pragma once

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>

#include "runtime/acl/task.h"
#include "runtime/aclnn/tensor.h"

typedef struct aclOpExecutor aclOpExecutor;

namespace aclnn {

constexpr int kParamNullptr = 161001;  // ACLNN_ERR_PARAM_NULLPTR
constexpr int kParamInvalid = 161002;  // ACLNN_ERR_PARAM_INVALID
constexpr int kInnerError = 561000;    // ACLNN_ERR_INNER
constexpr int kKernelFailed =
    507015;  // ACL_ERROR_RT_AICORE_EXCEPTION: what a failed kernel gives at the next sync

using Mode = host_runtime::MemoryAccess::Mode;

/// A refused argument. `code` is what phase 1 returns, the message what aclGetRecentErrMsg gives.
class ArgumentError : public std::runtime_error {
 public:
  ArgumentError(int code, const std::string& what) : std::runtime_error(what), code(code) {}
  int code;
};

/// A tensor argument: its name in the operator's definition and how the operator uses it.
struct Operand {
  const char* name;
  TensorRef tensor;
  Mode mode;
  bool whole = false;  ///< as MemoryAccess has it
};

/// A non-tensor argument, kept for the graph's debug print.
struct Attribute {
  const char* name;
  std::variant<int64_t, double, bool, c10::intrusive_ptr<aclScalar>, c10::intrusive_ptr<aclIntArray>,
               std::string>
      value;
};

/// Device memory that the caller of phase 2 provides. Phase 2 sets the address; a body that asked for it
/// keeps a share.
struct Workspace {
  void* address = nullptr;
};

/// One call of an operator with its arguments: a stream task.
class Operator final : public host_runtime::Task {
 public:
  explicit Operator(const char* name) : name_(name) {}

  void run() override;
  std::string name() const override { return name_; }
  std::vector<host_runtime::MemoryAccess> accesses() const override;
  std::string arguments_json() const override;

  /// Phase 2's memory, for bodies that asked for some. Throws ArgumentError when it is less than phase 1
  /// said.
  void bring_workspace(void* address, uint64_t bytes);

 private:
  friend class Call;
  const char* name_;
  c10::SmallVector<Operand, 4> operands_;
  c10::SmallVector<Attribute, 2> attributes_;
  Work work_;
  bool calls_aten_ = false;
  std::shared_ptr<Workspace> workspace_;
  uint64_t workspace_bytes_ = 0;
};

/// Collects the arguments of one call during phase 1. The functions named after parameter kinds record the
/// argument and throw ArgumentError when a required one is null.
class Call {
 public:
  explicit Call(const char* name) : operator_(std::make_shared<Operator>(name)) {}

  void tensor(const char* argument, const aclTensor* value, Mode mode, bool optional = false) {
    if (value != nullptr) {
      operator_->operands_.push_back({argument, share(value), mode});
    } else if (!optional) {
      null_argument(argument);
    }
  }
  /// A tensor that is read from the first byte to the last.
  void weight(const char* argument, const aclTensor* value) {
    tensor(argument, value, Mode::kRead);
    operator_->operands_.back().whole = true;
  }
  void tensors(const char* argument, const aclTensorList* value, Mode mode, bool optional = false);

  template <typename T>
  void require(const char* argument, const T* value) {
    if (value == nullptr) null_argument(argument);
  }
  template <typename T>
  void attribute(const char* argument, T value) {
    operator_->attributes_.push_back({argument, std::move(value)});
  }
  void attribute(const char* argument, const aclScalar* value) {
    if (value != nullptr) operator_->attributes_.push_back({argument, share(value)});
  }
  void attribute(const char* argument, const aclIntArray* value) {
    if (value != nullptr) operator_->attributes_.push_back({argument, share(value)});
  }

  /// Refuses FRACTAL_NZ and other private formats for operators that read bytes in plain order only.
  void require_plain() const;
  bool all_plain() const;

  /// Throws ArgumentError(kParamInvalid) with "aclnnX: argument `a` ...: <rule>".
  [[noreturn]] void refuse(const std::string& argument, const std::string& rule) const;
  [[noreturn]] void null_argument(const char* argument) const;

  /// Takes a prepared body. False when it is empty, that is, declined.
  bool take(Work work);
  /// Takes a body that calls ATen.
  void take_aten(Work work);

  const char* name() const { return operator_->name_; }
  /// Asks for `bytes` of device scratch; the address is there when the body runs.
  std::shared_ptr<Workspace> workspace(uint64_t bytes);
  /// Bytes of device memory that phase 1 asks for. Bodies own their scratch memory, so this is 0 unless
  /// stated.
  uint64_t workspace_bytes = 0;

 private:
  template <typename Fill>
  friend int prepare(const char*, uint64_t*, aclOpExecutor**, const Fill&);
  std::shared_ptr<Operator> operator_;
};

}  // namespace aclnn

/// The handle between the two phases. Phase 2 consumes it, unless it was made repeatable.
struct aclOpExecutor {
  std::shared_ptr<aclnn::Operator> operation;
  bool repeatable = false;
};

namespace aclnn {

/// Turns the exception in flight into phase 1's status and message.
int refused(const char* name);
int publish(std::shared_ptr<Operator> operation, uint64_t bytes, uint64_t* workspace,
            aclOpExecutor** executor);

/// Phase 1: `fill(call)` records and checks arguments and sets the body.
template <typename Fill>
int prepare(const char* name, uint64_t* workspace, aclOpExecutor** executor, const Fill& fill) {
  try {
    Call call(name);
    fill(call);
    return publish(std::move(call.operator_), call.workspace_bytes, workspace, executor);
  } catch (...) {
    return refused(name);
  }
}

/// Phase 2: submits what phase 1 prepared.
int execute(const char* name, void* workspace, uint64_t bytes, aclOpExecutor* executor, aclrtStream stream);

/// "float16[2, 3]" for messages.
std::string describe(const Tensor& tensor);
std::string describe(c10::ArrayRef<int64_t> dims);

}  // namespace aclnn
