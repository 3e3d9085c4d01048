#include "runtime/hccl/data_type.h"

#include "runtime/hccl/errors.h"

namespace host_runtime::hccl {

size_t element_bytes(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
    case HCCL_DATA_TYPE_HIF8:
    case HCCL_DATA_TYPE_FP8E4M3:
    case HCCL_DATA_TYPE_FP8E5M2:
    case HCCL_DATA_TYPE_FP8E8M0:
      return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16:
      return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32:
      return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64:
      return 8;
    case HCCL_DATA_TYPE_INT128:
      return 16;
    default:
      return 0;
  }
}

std::string data_type_name(uint32_t type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return "int8";
    case HCCL_DATA_TYPE_INT16:
      return "int16";
    case HCCL_DATA_TYPE_INT32:
      return "int32";
    case HCCL_DATA_TYPE_FP16:
      return "float16";
    case HCCL_DATA_TYPE_FP32:
      return "float32";
    case HCCL_DATA_TYPE_INT64:
      return "int64";
    case HCCL_DATA_TYPE_UINT64:
      return "uint64";
    case HCCL_DATA_TYPE_UINT8:
      return "uint8";
    case HCCL_DATA_TYPE_UINT16:
      return "uint16";
    case HCCL_DATA_TYPE_UINT32:
      return "uint32";
    case HCCL_DATA_TYPE_FP64:
      return "float64";
    case HCCL_DATA_TYPE_BFP16:
      return "bfloat16";
    case HCCL_DATA_TYPE_INT128:
      return "int128";
    case HCCL_DATA_TYPE_HIF8:
      return "hifloat8";
    case HCCL_DATA_TYPE_FP8E4M3:
      return "float8_e4m3";
    case HCCL_DATA_TYPE_FP8E5M2:
      return "float8_e5m2";
    case HCCL_DATA_TYPE_FP8E8M0:
      return "float8_e8m0";
    default:
      return "HcclDataType(" + std::to_string(type) + ")";
  }
}

std::string reduction_name(uint32_t op) {
  switch (op) {
    case HCCL_REDUCE_SUM:
      return "sum";
    case HCCL_REDUCE_PROD:
      return "prod";
    case HCCL_REDUCE_MAX:
      return "max";
    case HCCL_REDUCE_MIN:
      return "min";
    default:
      return "HcclReduceOp(" + std::to_string(op) + ")";
  }
}

void require_movable(HcclDataType type) {
  if (element_bytes(type) == 0 || type == HCCL_DATA_TYPE_INT128) {
    throw Error(HCCL_E_NOT_SUPPORT, "data type " + data_type_name(type) + " cannot be sent between ranks");
  }
}

void require_reducible(HcclDataType type, HcclReduceOp op, bool variable_counts) {
  bool known = false;
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_FP32:
    case HCCL_DATA_TYPE_BFP16:
      known = true;
      break;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_INT64:
      known = !variable_counts;
      break;
    default:
      break;
  }
  if (!known) {
    throw Error(HCCL_E_NOT_SUPPORT, "data type " + data_type_name(type) +
                                        " cannot be reduced; HCCL takes int8, int32, float16, float32, " +
                                        "bfloat16" + (variable_counts ? "" : ", int16 and int64") +
                                        ". Convert the tensor first");
  }
  if (op != HCCL_REDUCE_SUM && op != HCCL_REDUCE_PROD && op != HCCL_REDUCE_MAX && op != HCCL_REDUCE_MIN) {
    throw Error(HCCL_E_PARA, "unknown reduction " + reduction_name(op));
  }
  const bool half_range = type == HCCL_DATA_TYPE_INT16 || type == HCCL_DATA_TYPE_BFP16;
  if (op == HCCL_REDUCE_PROD && (half_range || variable_counts)) {
    throw Error(HCCL_E_NOT_SUPPORT, "HCCL has no prod for " + data_type_name(type) +
                                        (variable_counts ? " with counts per rank" : "") +
                                        "; convert to float32 or int32 first");
  }
}

}  // namespace host_runtime::hccl
