#include "runtime/kernels/int8_product.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime/kernels/int8_digits.h"
#include "runtime/kernels/isa.h"
#include "runtime/kernels/scalar.h"
#include "runtime/kernels/share.h"

namespace host_runtime::kernels {

#define KERNEL_SOURCE "runtime/kernels/int8_product.inc"
#include "runtime/kernels/per_isa.h"

namespace {

template <typename X, typename T>
void shared_columns(const Int8Product& p) {
  const auto run = PER_ISA(int8_columns<X, T>);
  share_columns(p.inner, p.columns, kInt8ColumnBlock,
                [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

void int8_product(const Int8Product& product) {
  if (int8_digits(product)) return;
  visit(product.type, [&](auto zero) {
    using T = decltype(zero);
    product.int8_x ? shared_columns<int8_t, T>(product) : shared_columns<T, T>(product);
  });
}

}  // namespace host_runtime::kernels
