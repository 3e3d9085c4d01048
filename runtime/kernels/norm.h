// RMSNorm, LayerNorm and their fusions with the residual sum: float accumulation for every element type.
#pragma once

#include "runtime/kernels/dtype.h"
#include "runtime/kernels/rows.h"

namespace host_runtime::kernels {

/// What a normalisation reads and writes: `rows` rows of `width` contiguous elements.
struct RmsNorm {
  Type type;             ///< of x, residual, y and sum
  Type gamma_type;       ///< the same, or kFloat
  const void* x;         ///< rows laid out as x_rows says
  const void* residual;  ///< added to x first; nullptr: none
  const void* gamma;     ///< `width` elements
  void* y;               ///< rows of y_rows
  float* rstd;           ///< one a row, contiguous; nullptr: not wanted
  void* sum;             ///< x + residual, rows of sum_rows; nullptr: not wanted
  float* y_float;        ///< y before its last rounding, contiguous; nullptr: not wanted
  Rows x_rows, residual_rows, y_rows, sum_rows;
  int64_t rows;
  int64_t width;
  float epsilon;
  float gamma_offset;       ///< added to gamma (Gemma's RMSNorm: 1)
  bool round_before_gamma;  ///< AddRmsNorm on 910B rounds x * rstd to the element type before gamma
};

void rms_norm(const RmsNorm& arguments);

/// Over `rows` rows of `width` contiguous elements of x + residual + bias, which is not rounded before it is
/// normalised.
struct LayerNorm {
  Type type;        ///< of x, residual, bias, y and sum
  Type gamma_type;  ///< of gamma and beta: the same, or kFloat
  const void* x;
  const void* residual;  ///< nullptr: none
  const void* bias;      ///< rows of bias_rows; nullptr: none
  const void* gamma;     ///< `width` elements; nullptr: 1
  const void* beta;      ///< `width` elements; nullptr: 0
  void* y;
  void* sum;    ///< nullptr: not wanted
  float* mean;  ///< one a row, contiguous; nullptr: not wanted
  float* rstd;
  Rows x_rows, residual_rows, bias_rows, y_rows, sum_rows;
  int64_t rows;
  int64_t width;
  float epsilon;
};

void layer_norm(const LayerNorm& arguments);

}  // namespace host_runtime::kernels
