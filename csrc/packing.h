// From a weight as it comes, in one or several parts that stand below one another, to panels: see linear.cpp and
// quantized.cpp, which draw them. And a checksum, so that panels kept in a file are known again.
#pragma once

#include "quire.h"

// n rows of a weight; row i begins `stride` * i elements behind `rows`, and its elements lie side by side.
typedef struct {
    const void* rows;
    int64_t stride, n;
} QuirePart;

// Panels of all rows of the parts, each of k values; as many bytes as quire_packed_size says.
QUIRE_API void quire_pack_parts(int32_t dtype, const QuirePart* parts, int64_t count, int64_t k, void* packed);
// The same, rounded first as kernels/rounding.py says; as many bytes as quire_quantized_size says. weight->n is the sum.
QUIRE_API void quire_round_parts(const QuireQuantized* weight, int32_t dtype, const QuirePart* parts, int64_t count,
                                 void* packed);
// A number that damage changes. No secret: it does not protect from those who want the same number.
QUIRE_API uint64_t quire_checksum(const void* data, int64_t bytes);
