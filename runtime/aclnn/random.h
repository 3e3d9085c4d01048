// Random fills. Each element's number depends only on (seed, offset, position), so a result does not depend
// on threads.
#pragma once

#include <ATen/ATen.h>

namespace aclnn {

/// Where a generator stands: torch_npu's (seed, offset), as values or as one-element tensors that a graph
/// updates.
struct Philox {
  Philox(int64_t seed, int64_t offset)
      : seed(static_cast<uint64_t>(seed)), offset(static_cast<uint64_t>(offset)) {}
  Philox(const at::Tensor& seed, const at::Tensor& offset, uint64_t intragraph);
  uint64_t seed;
  uint64_t offset;
};

namespace random {

void uniform(at::Tensor& self, double from, double to, const Philox& philox);
void normal(at::Tensor& self, double mean, double std, const Philox& philox);
/// Rate `lambda`; never zero, so that it can divide probabilities.
void exponential(at::Tensor& self, double lambda, const Philox& philox);
/// Integers in [from, to).
void integers(at::Tensor& self, int64_t from, int64_t to, const Philox& philox);
/// One past the largest integer that random_() without bounds gives for a dtype.
int64_t limit(at::ScalarType dtype);
void bernoulli(at::Tensor& self, const at::Tensor& p, const Philox& philox);
void permutation(int64_t n, at::Tensor& out, const Philox& philox);
void multinomial(const at::Tensor& weights, int64_t samples, bool replacement, at::Tensor& out,
                 const Philox& philox);
/// Bytes of bits, least significant first; a bit is 1 (keep) with probability 1 - p.
void dropout_mask(double p, at::Tensor& mask, const Philox& philox);
void apply_dropout_mask(const at::Tensor& self, const at::Tensor& mask, double p, at::Tensor& out);

}  // namespace random
}  // namespace aclnn
