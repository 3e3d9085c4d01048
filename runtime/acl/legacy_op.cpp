// CANN's older way of calling operators by name. The host runtime has none of these operators, and says so as
// early as it can. torch_npu queues such a call for a thread of its own; when the call fails there, it
// reports the failure once and drops whatever is queued later without a word. But right before, on the
// caller's thread, it always sets the compile option ACL_OP_JIT_COMPILE, so that is where the operator is
// refused: the error comes out of the very line of Python that needs the operator, and nothing is lost.
#include "runtime/acl/legacy_op.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdio>
#include <cstdlib>

#include "acl/acl_op_compiler.h"
#include "runtime/acl/error.h"
#include "runtime/acl/stream.h"

using namespace host_runtime;

namespace {

// The tensors described on this thread since the last refusal, to tell which call it was.
thread_local std::vector<std::string> described_tensors;

std::string function_at(void* address) {
  Dl_info info{};
  if (dladdr(address, &info) == 0 || info.dli_sname == nullptr) return "";
  int status = 0;
  char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string result = status == 0 && name != nullptr ? name : info.dli_sname;
  std::free(name);
  return result;
}

/// The functions that lead to this call, innermost first, as far as their libraries export them.
std::vector<std::string> callers() {
  void* addresses[48];
  const int depth = backtrace(addresses, 48);
  std::vector<std::string> names;
  for (int i = 1; i < depth; ++i) names.push_back(function_at(addresses[i]));
  return names;
}

/// "ceil" out of "at::_ops::ceil::call(at::Tensor const&)"; empty when PyTorch's dispatcher is not among the
/// callers.
std::string operator_of(const std::vector<std::string>& functions) {
  for (const std::string prefix : {"at::_ops::", "at_npu::native::custom_ops::"}) {
    for (const std::string& function : functions) {
      if (function.compare(0, prefix.size(), prefix) != 0) continue;
      return function.substr(prefix.size(), function.find_first_of(":(", prefix.size()) - prefix.size());
    }
  }
  return "";
}

void note_tensor(const aclTensorDesc& desc) {
  constexpr size_t kMost = 16;
  if (described_tensors.size() == kMost) described_tensors.erase(described_tensors.begin());
  std::string text = "type " + std::to_string(desc.dtype) + " [";
  for (size_t i = 0; i < desc.dims.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(desc.dims[i]);
  described_tensors.push_back(text + "]");
}

aclError refuse_operator(const char* name, aclrtStream handle) {
  const std::string text =
      std::string("operator ") + (name == nullptr ? "(null)" : name) +
      " has no implementation in the host runtime: torch_npu found no aclnn operator for this "
      "call and fell back to CANN's compiler for operators (aclopCompileAndExecute)";
  std::fprintf(stderr, "[host runtime] %s\n", text.c_str());
  if (const auto stream = find_stream(handle, "aclopCompileAndExecute"))
    stream->abort(ACL_ERROR_OP_NOT_FOUND, text);
  return fail(ACL_ERROR_OP_NOT_FOUND, text);
}

template <typename... Values>
aclError set_attribute(aclopAttr* attr, const char* name, Values...) {
  if (attr == nullptr) return fail_null("aclopSetAttr", "attr");
  if (name == nullptr) return fail_null("aclopSetAttr", "attrName");
  attr->names.emplace_back(name);
  return ACL_SUCCESS;
}

}  // namespace

namespace host_runtime {

aclError refuse_legacy_operator() {
  const auto functions = callers();
  bool runs_operator = false;
  for (const std::string& function : functions) {
    runs_operator = runs_operator || function.find("OpCommand::Run(") != std::string::npos;
  }
  if (!runs_operator) return ACL_SUCCESS;
  const std::string name = operator_of(functions);
  std::string text =
      (name.empty() ? std::string("an operator") : "operator " + name) +
      " has no implementation in the host runtime: torch_npu found no aclnn operator for this call and "
      "fell back to CANN's operator compiler. Tensors:";
  for (const std::string& tensor : described_tensors) text += " " + tensor + ";";
  described_tensors.clear();
  return fail(ACL_ERROR_OP_NOT_FOUND, text);
}

}  // namespace host_runtime

aclDataBuffer* aclCreateDataBuffer(void* data, size_t size) {
  return new (std::nothrow) aclDataBuffer{data, size};
}

aclError aclDestroyDataBuffer(const aclDataBuffer* dataBuffer) {
  if (dataBuffer == nullptr) return fail_null("aclDestroyDataBuffer", "dataBuffer");
  delete dataBuffer;
  return ACL_SUCCESS;
}

aclError aclUpdateDataBuffer(aclDataBuffer* dataBuffer, void* data, size_t size) {
  if (dataBuffer == nullptr) return fail_null("aclUpdateDataBuffer", "dataBuffer");
  *dataBuffer = {data, size};
  return ACL_SUCCESS;
}

void* aclGetDataBufferAddr(const aclDataBuffer* dataBuffer) {
  return dataBuffer == nullptr ? nullptr : dataBuffer->data;
}

uint32_t aclGetDataBufferSize(const aclDataBuffer* dataBuffer) {
  return dataBuffer == nullptr ? 0 : static_cast<uint32_t>(dataBuffer->size);
}

size_t aclGetDataBufferSizeV2(const aclDataBuffer* dataBuffer) {
  return dataBuffer == nullptr ? 0 : dataBuffer->size;
}

aclTensorDesc* aclCreateTensorDesc(aclDataType dataType, int numDims, const int64_t* dims, aclFormat format) {
  if (numDims < 0 || (numDims > 0 && dims == nullptr)) {
    fail(ACL_ERROR_INVALID_PARAM, "aclCreateTensorDesc: dims is null, or numDims negative");
    return nullptr;
  }
  auto* desc = new (std::nothrow) aclTensorDesc{};
  if (desc == nullptr) return nullptr;
  desc->dtype = dataType;
  desc->format = desc->storage_format = format;
  desc->dims.assign(dims, dims + numDims);
  desc->storage_dims = desc->dims;
  note_tensor(*desc);
  return desc;
}

void aclDestroyTensorDesc(const aclTensorDesc* desc) { delete desc; }

aclDataType aclGetTensorDescType(const aclTensorDesc* desc) {
  return desc == nullptr ? ACL_DT_UNDEFINED : desc->dtype;
}

aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) {
  return desc == nullptr ? ACL_FORMAT_UNDEFINED : desc->format;
}

size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) { return desc == nullptr ? 0 : desc->dims.size(); }

aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* dimSize) {
  if (desc == nullptr) return fail_null("aclGetTensorDescDimV2", "desc");
  if (dimSize == nullptr) return fail_null("aclGetTensorDescDimV2", "dimSize");
  if (index >= desc->dims.size())
    return fail(ACL_ERROR_INVALID_PARAM, "aclGetTensorDescDimV2: there is no such dimension");
  *dimSize = desc->dims[index];
  return ACL_SUCCESS;
}

void aclSetTensorDescName(aclTensorDesc* desc, const char* name) {
  if (desc != nullptr && name != nullptr) desc->name = name;
}

aclError aclSetTensorFormat(aclTensorDesc* desc, aclFormat format) {
  if (desc == nullptr) return fail_null("aclSetTensorFormat", "desc");
  desc->storage_format = format;
  return ACL_SUCCESS;
}

aclError aclSetTensorShape(aclTensorDesc* desc, int numDims, const int64_t* dims) {
  if (desc == nullptr) return fail_null("aclSetTensorShape", "desc");
  if (numDims < 0 || (numDims > 0 && dims == nullptr)) return fail_null("aclSetTensorShape", "dims");
  desc->storage_dims.assign(dims, dims + numDims);
  return ACL_SUCCESS;
}

aclError aclSetTensorPlaceMent(aclTensorDesc* desc, aclMemType memType) {
  if (desc == nullptr) return fail_null("aclSetTensorPlaceMent", "desc");
  desc->placement = memType;
  return ACL_SUCCESS;
}

aclopAttr* aclopCreateAttr() { return new (std::nothrow) aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attr) { delete attr; }

aclError aclopSetAttrBool(aclopAttr* attr, const char* name, uint8_t value) {
  return set_attribute(attr, name, value);
}
aclError aclopSetAttrInt(aclopAttr* attr, const char* name, int64_t value) {
  return set_attribute(attr, name, value);
}
aclError aclopSetAttrFloat(aclopAttr* attr, const char* name, float value) {
  return set_attribute(attr, name, value);
}
aclError aclopSetAttrString(aclopAttr* attr, const char* name, const char* value) {
  return set_attribute(attr, name, value);
}
aclError aclopSetAttrDataType(aclopAttr* attr, const char* name, aclDataType value) {
  return set_attribute(attr, name, value);
}
aclError aclopSetAttrListBool(aclopAttr* attr, const char* name, int n, const uint8_t* values) {
  return set_attribute(attr, name, n, values);
}
aclError aclopSetAttrListInt(aclopAttr* attr, const char* name, int n, const int64_t* values) {
  return set_attribute(attr, name, n, values);
}
aclError aclopSetAttrListFloat(aclopAttr* attr, const char* name, int n, const float* values) {
  return set_attribute(attr, name, n, values);
}
aclError aclopSetAttrListListInt(aclopAttr* attr, const char* name, int n, const int* counts,
                                 const int64_t* const values[]) {
  return set_attribute(attr, name, n, counts, values);
}

aclError aclopCompileAndExecute(const char* opType, int, const aclTensorDesc* const[],
                                const aclDataBuffer* const[], int, const aclTensorDesc* const[],
                                aclDataBuffer* const[], const aclopAttr*, aclopEngineType, aclopCompileType,
                                const char*, aclrtStream stream) {
  return guarded("aclopCompileAndExecute", [&] { return refuse_operator(opType, stream); });
}

aclError aclopCompileAndExecuteV2(const char* opType, int, aclTensorDesc*[], aclDataBuffer*[], int,
                                  aclTensorDesc*[], aclDataBuffer*[], aclopAttr*, aclopEngineType,
                                  aclopCompileType, const char*, aclrtStream stream) {
  return guarded("aclopCompileAndExecuteV2", [&] { return refuse_operator(opType, stream); });
}
