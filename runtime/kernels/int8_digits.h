// Products of a few rows with a matrix of int8, by dot products of bytes (AVX512-VNNI).
#pragma once

#include "runtime/kernels/int8_product.h"

namespace host_runtime::kernels {

/// Forms a product with exact sums. A row of floats is taken as integers times one power of two, rounded to
/// 2^-30 of its largest value.
/// False, and nothing is written: without such dot products here, of rows that are too long for sums of 32
/// bits, of more than three rows of floats, and where one of those has an infinity, a NaN, only values below
/// 2^-97 that are not all zero, or a value so far above the others that these would lose precision.
bool int8_digits(const Int8Product& product);

}  // namespace host_runtime::kernels
