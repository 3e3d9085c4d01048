// Iteration over elementwise operands: dimensions that lie together are merged, and what remains is an inner
// run of elements one after another (or one broadcast element) inside at most three outer loops.
#pragma once

#include <array>
#include <initializer_list>
#include <optional>

#include "runtime/aclnn/tensor.h"

namespace aclnn::kernels {

constexpr int kMaxOperands = 4;
constexpr int kOuterLoops = 3;

/// Operand 0 is the result. Steps are in bytes.
struct Loops {
  int operands = 0;
  int outer = 0;  // how many outer loops there are
  int64_t inner = 1;
  std::array<int64_t, kOuterLoops> size{};
  std::array<std::array<int64_t, kMaxOperands>, kOuterLoops> step{};
  std::array<bool, kMaxOperands> broadcast{};  // whether the inner run of an operand is one element
  std::array<char*, kMaxOperands> base{};

  /// Calls run(pointers) once per inner run.
  template <typename Run>
  void each(const Run& run) const {
    if (outer == 0) return run(base);
    walk(outer - 1, base, run);
  }

 private:
  template <typename Run>
  void walk(int level, std::array<char*, kMaxOperands> at, const Run& run) const {
    for (int64_t i = 0; i < size[level]; ++i) {
      if (level == 0) {
        run(at);
      } else {
        walk(level - 1, at, run);
      }
      for (int k = 0; k < operands; ++k) at[k] += step[level][k];
    }
  }
};

/// The loops over `result` and operands that broadcast to it, or nothing when an operand does not fit the
/// scheme.
std::optional<Loops> plan_loops(const Tensor& result, std::initializer_list<const Tensor*> operands);

}  // namespace aclnn::kernels
