// Prepared forms of the quantising operators. Each declines (an empty Work) what its kernel does not do; the
// ATen body of the definition then runs.
#pragma once

#include <string>
#include <vector>

#include "runtime/aclnn/tensor.h"

namespace aclnn::prepared {

/// aclnnDynamicQuant(V2): symmetric, per token, smooth scales for all rows.
Work dynamic_quant(const Tensor& x, const Tensor* smooth, const Tensor* group_index, const Tensor& y,
                   const Tensor& scale, const Tensor* offset);
/// aclnnAscendQuant(V3): multiplies; aclnnQuantize (divide): one scale, or one for each column.
Work static_quant(const Tensor& x, const Tensor& scale, const Tensor* offset, int64_t axis, bool divide,
                  const Tensor& y);
/// aclnnDequantSwigluQuant of floats.
Work swiglu_quant(const Tensor& x, const Tensor* quant_scale, const Tensor* quant_offset, bool activate_left,
                  bool dynamic, const Tensor& y, const Tensor& scale);

/// aclnnRmsNormQuant, aclnnAddRmsNormQuant(V2), aclnnAddRmsNormDynamicQuantV2.
struct NormQuant {
  const Tensor* x = nullptr;
  const Tensor* residual = nullptr;
  const Tensor* gamma = nullptr;
  const Tensor* beta = nullptr;
  double epsilon = 0.0;
  const Tensor* sum = nullptr;
  struct Output {
    const Tensor* y = nullptr;
    const Tensor* scale = nullptr;  ///< not null: dynamic
    const Tensor* factor = nullptr;
    const Tensor* offset = nullptr;
  } outputs[2];
  bool divide = false;
};
Work norm_quant(const NormQuant& arguments);

/// aclnnQuantMatmulV5: rows of int8, scales of floats, no offsets; x2 in FRACTAL_NZ or with contiguous
/// columns (the weight of a linear layer), without AMX the latter and a few rows.
struct QuantProduct {
  const Tensor* x1;
  const Tensor* x2;
  const Tensor* x1_scale;  ///< null: none
  const Tensor* x2_scale;
  const Tensor* bias;                 ///< null: none
  std::vector<const Tensor*> others;  ///< taken where all are absent
  bool transpose1, transpose2;
  const Tensor* out;
};
Work quant_matmul(const QuantProduct& arguments);
/// aclnnWeightQuantBatchMatmulV2/V3: a few rows of float16 or bfloat16, without offset and groups.
Work weight_quant_matmul(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor* offset,
                         const Tensor* bias, int64_t group, const Tensor& out);

}  // namespace aclnn::prepared
