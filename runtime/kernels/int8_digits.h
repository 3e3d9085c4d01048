// Products of a few rows of floats with a matrix of int8, by dot products of bytes (AVX512-VNNI).
#pragma once

#include "runtime/kernels/int8_product.h"

namespace host_runtime::kernels {

/// Forms a product of floats, and more exactly than in floats: each row of x is taken as integers times one
/// power of two, rounded to 2^-30 of the row's largest value, and their sums with w are exact.
/// False, and nothing is written: without such dot products here, of int8 x, of rows that are too long for
/// sums of 32 bits, and where a row has an infinity, a NaN or only values below 2^-97.
bool int8_digits(const Int8Product& product);

}  // namespace host_runtime::kernels
