// Constraint clauses of operator definitions: each throws ArgumentError naming operator, argument and rule.
#pragma once

#include <initializer_list>

#include "runtime/aclnn/operator.h"

namespace aclnn::check {

/// A tensor argument with its name; null when optional and absent, which every check accepts.
struct Named {
  const char* name;
  const Tensor* tensor;
};

void same_dtype(const Call& call, std::initializer_list<Named> tensors);
void same_shape(const Call& call, std::initializer_list<Named> tensors);
void dtype_in(const Call& call, Named tensor, std::initializer_list<c10::ScalarType> allowed);
void rank_between(const Call& call, Named tensor, int64_t low, int64_t high);
/// `result` must have the shape that broadcasting `operands` gives.
void broadcast(const Call& call, std::initializer_list<Named> operands, Named result);

}  // namespace aclnn::check
