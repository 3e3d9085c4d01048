#include "runtime/aclnn/random.h"

#include <ATen/core/PhiloxRNGEngine.h>

#include <array>
#include <cmath>
#include <limits>

namespace aclnn {

Philox::Philox(const at::Tensor& seed_tensor, const at::Tensor& offset_tensor, uint64_t intragraph)
    : seed(static_cast<uint64_t>(seed_tensor.item<int64_t>())),
      offset(static_cast<uint64_t>(offset_tensor.item<int64_t>()) + intragraph) {}

namespace random {
namespace {

using Block = std::array<uint32_t, 4>;

/// The four numbers of a position: Philox's counter is (offset, position).
Block draw(const Philox& philox, uint64_t position) {
  at::philox_engine engine(philox.seed, position, philox.offset);
  return {engine(), engine(), engine(), engine()};
}

/// [0, 1), as many bits as a float holds.
float unit(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24F; }
/// (0, 1].
float positive_unit(uint32_t bits) { return static_cast<float>((bits >> 8) + 1) * 0x1p-24F; }

/// Fills a contiguous fp32 tensor, four elements to a block, and rounds to the dtype of `self`.
template <typename Function>
void fill(at::Tensor& self, const Philox& philox, const Function& function) {
  const bool direct = self.scalar_type() == at::kFloat && self.is_contiguous();
  at::Tensor values = direct ? self : at::empty(self.sizes(), at::kFloat);
  float* data = values.data_ptr<float>();
  const int64_t count = values.numel();
  for (int64_t i = 0; i < count; i += 4) {
    const std::array<float, 4> four = function(draw(philox, static_cast<uint64_t>(i / 4)));
    for (int64_t j = 0; j < std::min<int64_t>(4, count - i); ++j) data[i + j] = four[j];
  }
  if (!direct) self.copy_(values);
}

}  // namespace

void uniform(at::Tensor& self, double from, double to, const Philox& philox) {
  const auto low = static_cast<float>(from), width = static_cast<float>(to - from);
  fill(self, philox, [=](const Block& b) {
    return std::array<float, 4>{unit(b[0]) * width + low, unit(b[1]) * width + low, unit(b[2]) * width + low,
                                unit(b[3]) * width + low};
  });
}

void normal(at::Tensor& self, double mean, double std, const Philox& philox) {
  const auto m = static_cast<float>(mean), s = static_cast<float>(std);
  fill(self, philox, [=](const Block& b) {
    constexpr float kTwoPi = 6.283185307179586F;
    const float r0 = s * std::sqrt(-2 * std::log(positive_unit(b[0]))), a0 = kTwoPi * unit(b[1]);
    const float r1 = s * std::sqrt(-2 * std::log(positive_unit(b[2]))), a1 = kTwoPi * unit(b[3]);
    return std::array<float, 4>{m + r0 * std::cos(a0), m + r0 * std::sin(a0), m + r1 * std::cos(a1),
                                m + r1 * std::sin(a1)};
  });
}

void exponential(at::Tensor& self, double lambda, const Philox& philox) {
  const auto scale = static_cast<float>(-1 / lambda);
  // 1 - 2^-25 at most, so that no element is zero.
  const auto one = [=](uint32_t bits) {
    return scale * std::log(std::min(positive_unit(bits), 0x1.fffffep-1F));
  };
  fill(self, philox,
       [=](const Block& b) { return std::array<float, 4>{one(b[0]), one(b[1]), one(b[2]), one(b[3])}; });
}

void integers(at::Tensor& self, int64_t from, int64_t to, const Philox& philox) {
  const uint64_t range = static_cast<uint64_t>(to) - static_cast<uint64_t>(from);
  at::Tensor values = at::empty(self.sizes(), at::kLong);
  auto* data = values.data_ptr<int64_t>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    const Block b = draw(philox, static_cast<uint64_t>(i));
    const uint64_t bits = (static_cast<uint64_t>(b[0]) << 32) | b[1];
    data[i] = static_cast<int64_t>(static_cast<uint64_t>(from) + (range == 0 ? bits : bits % range));
  }
  self.copy_(values);
}

int64_t limit(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return (int64_t{1} << 11) + 1;
    case at::kBFloat16:
      return (int64_t{1} << 8) + 1;
    case at::kFloat:
      return (int64_t{1} << 24) + 1;
    case at::kDouble:
      return (int64_t{1} << 53) + 1;
    case at::kBool:
      return 2;
    case at::kByte:
      return 256;
    case at::kChar:
      return 128;
    case at::kShort:
      return int64_t{1} << 15;
    case at::kInt:
      return int64_t{1} << 31;
    default:
      return std::numeric_limits<int64_t>::max();
  }
}

void bernoulli(at::Tensor& self, const at::Tensor& p, const Philox& philox) {
  at::Tensor values = at::empty(self.sizes(), at::kFloat);
  uniform(values, 0, 1, philox);
  self.copy_(values.lt(p.to(at::kFloat)));
}

void permutation(int64_t n, at::Tensor& out, const Philox& philox) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  for (int64_t i = n - 1; i > 0; --i) {
    const Block b = draw(philox, static_cast<uint64_t>(i));
    const uint64_t bits = (static_cast<uint64_t>(b[0]) << 32) | b[1];
    std::swap(order[i], order[bits % static_cast<uint64_t>(i + 1)]);
  }
  out.copy_(at::tensor(order, at::kLong));
}

void multinomial(const at::Tensor& weights, int64_t samples, bool replacement, at::Tensor& out,
                 const Philox& philox) {
  const at::Tensor p = weights.to(at::kFloat);
  if (!replacement || samples == 1) {
    // The smallest of exponential variables with rates p is drawn with probability p.
    at::Tensor race = at::empty(p.sizes(), at::kFloat);
    exponential(race, 1, philox);
    out.copy_(std::get<1>(at::topk(p / race, samples, -1)));
    return;
  }
  std::vector<int64_t> shape = p.sizes().vec();
  shape.back() = samples;
  at::Tensor uniforms = at::empty(shape, at::kFloat);
  uniform(uniforms, 0, 1, philox);
  const at::Tensor sums = p.cumsum(-1);
  const at::Tensor total = sums.narrow(-1, sums.size(-1) - 1, 1);
  out.copy_(at::searchsorted(sums, (uniforms * total).contiguous(), false, true).clamp_max(p.size(-1) - 1));
}

void dropout_mask(double p, at::Tensor& mask, const Philox& philox) {
  const auto keep = static_cast<float>(1 - p);
  auto* bytes = static_cast<uint8_t*>(mask.data_ptr());
  for (int64_t i = 0; i < mask.numel(); ++i) {
    uint8_t bits = 0;
    for (int half = 0; half < 2; ++half) {
      const Block b = draw(philox, static_cast<uint64_t>(2 * i + half));
      for (int j = 0; j < 4; ++j) bits |= static_cast<uint8_t>((unit(b[j]) < keep) << (4 * half + j));
    }
    bytes[i] = bits;
  }
}

void apply_dropout_mask(const at::Tensor& self, const at::Tensor& mask, double p, at::Tensor& out) {
  const auto* bytes = static_cast<const uint8_t*>(mask.data_ptr());
  at::Tensor keep = at::empty(self.sizes(), at::kBool);
  bool* flags = keep.data_ptr<bool>();
  for (int64_t i = 0; i < self.numel(); ++i) flags[i] = (bytes[i / 8] >> (i % 8)) & 1;
  out.copy_(p >= 1 ? at::zeros_like(self) : at::where(keep, self * (1 / (1 - p)), at::zeros_like(self)));
}

}  // namespace random
}  // namespace aclnn
