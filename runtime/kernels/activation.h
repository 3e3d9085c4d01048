// Gated activations: silu(a) * b and gelu(a) * b over two halves of a row.
#pragma once

#include "runtime/kernels/dtype.h"

namespace host_runtime::kernels {

enum class Gate : uint8_t { kSilu, kGeluErf, kGeluTanh };

/// y = gate(a) * b for `rows` rows of `width` elements. `a` and `b` start at their own pointers and share one
/// row stride (elements): both halves of one tensor. Every row is contiguous inside.
struct GatedActivation {
  Type type;
  Gate gate;
  const void* activated;
  const void* linear;
  void* y;
  void* gated;  ///< gate(a) alone, laid out as y; nullptr: not wanted
  int64_t rows;
  int64_t width;
  int64_t input_row_stride;
  int64_t output_row_stride;
};

void gated_activation(const GatedActivation& arguments);

}  // namespace host_runtime::kernels
