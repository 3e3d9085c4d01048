// CANN's older way of calling operators by name. The host runtime has none of these operators: every call
// fails at once with the operator's name. torch_npu makes them on a thread of its own and may drop what comes
// after a failure until the next synchronisation, so the stream fails as well, and the name goes to standard
// error.
#include "runtime/acl/legacy_op.h"

#include <cstdio>

#include "acl/acl_op_compiler.h"
#include "runtime/acl/error.h"
#include "runtime/acl/stream.h"

using namespace host_runtime;

namespace {

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
