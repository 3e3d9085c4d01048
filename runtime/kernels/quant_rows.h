// Rows of floats made int8: plain, or as they come out of an RMSNorm or a SwiGLU, with static or dynamic
// scales.
#pragma once

#include <cstddef>

#include "runtime/kernels/dtype.h"
#include "runtime/kernels/rows.h"

namespace host_runtime::kernels {

enum class RowSource : uint8_t {
  kPlain,    ///< x
  kRmsNorm,  ///< norm(x + residual) * gamma + beta
  kSwiglu,   ///< silu(x) * linear
};

/// One value for all columns or one for each.
struct QuantParameter {
  enum class Type : uint8_t { kFloat, kHalf, kBFloat, kInt8, kInt32 };
  const void* data = nullptr;  ///< nullptr: not wanted
  Type type = Type::kFloat;
  int64_t count = 0;  ///< 1 or the width
};

/// y = round(row * factor + offset), to nearest even and saturated; dynamic: y = round(row * factor / scale).
struct QuantOutput {
  int8_t* y = nullptr;     ///< contiguous; nullptr: not wanted
  float* scale = nullptr;  ///< dynamic: max(|row * factor|) / 127 of every row; nullptr: static
  QuantParameter factor;
  QuantParameter offset;
  bool divide = false;  ///< row / factor
};

struct QuantRows {
  RowSource source;
  Type type;  ///< of x, residual, linear, gamma, beta and sum
  const void* x;
  const void* residual;  ///< nullptr: none
  const void* linear;    ///< rows of x_rows
  const void* gamma;
  const void* beta;  ///< nullptr: 0
  void* sum;         ///< x + residual, rounded as the type's own addition; nullptr: not wanted
  Rows x_rows, residual_rows, sum_rows;
  QuantOutput outputs[2];
  int64_t rows;
  int64_t width;
  float epsilon;

  /// Floats: a row, and factor and offset of either output.
  size_t scratch() const { return static_cast<size_t>(5 * width); }
};

/// `scratch` has room for arguments.scratch() floats.
void quant_rows(const QuantRows& arguments, float* scratch);

}  // namespace host_runtime::kernels
