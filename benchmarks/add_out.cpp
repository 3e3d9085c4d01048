// What a loop in C++ over ATen's operator costs: the peer of the captured additions
// (benchmarks/row_graph_launch.py).
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/full.h>
#include <c10/core/InferenceMode.h>

/// Adds ones to `count` floats (`values`, which it changes) `times` times by at::add_out.
extern "C" void add_out_loop(float* values, int64_t count, int64_t times) {
  const c10::InferenceMode guard;
  at::Tensor sum = at::full({count}, 0.0f);
  const at::Tensor one = at::full({count}, 1.0f);
  for (int64_t i = 0; i < count; ++i) sum.data_ptr<float>()[i] = values[i];
  for (int64_t i = 0; i < times; ++i) at::add_out(sum, sum, one);
  for (int64_t i = 0; i < count; ++i) values[i] = sum.data_ptr<float>()[i];
}
