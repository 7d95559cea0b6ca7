// Programs: the native calls of one step as data, so that a step runs without Python between its calls.
//
// A call is a function of this library and its arguments, one cell of 8 bytes for each in their order. What is the same
// in every step stands in the cells already; what depends on the step (where the step's tensors lie, how many rows there
// are) is written by the call's patches just before it runs. How programs come about: kernels/cpu/program_*.py.
#pragma once

#include "quire.h"

// Writes addresses[base] + offset + factor * sizes[size], without the terms whose index is below 0, to `bytes` bytes.
typedef struct {
    int64_t place;  // in bytes, from the first cell
    int32_t bytes;  // 4 or 8
    int32_t base, size;
    int32_t unused;
    int64_t offset, factor;
} QuirePatch;

typedef struct {
    int32_t function;  // its place in quire_program_functions()
    int32_t cell;      // of the first argument
    int32_t patch, patches;
} QuireCall;

// The names of the functions that a program may call, with a space after each.
QUIRE_API const char* quire_program_functions(void);
// Makes the calls in order. Returns -1, or the index of the call that refused its arguments and was the last one made.
QUIRE_API int64_t quire_run_program(const QuireCall* calls, int64_t count, const QuirePatch* patches, void* cells,
                                    const int64_t* addresses, const int64_t* sizes);

// ---- strided.cpp: what stands between the kernels in the models of others. Sizes and strides count elements, the last
// dimension comes last; a stride of 0 repeats. Numbers are float32 or bfloat16, results are rounded once.
enum { QUIRE_COPY, QUIRE_ADD, QUIRE_SUB, QUIRE_MUL, QUIRE_DIV };
typedef struct {
    const void *a, *b;  // b: null for a copy
    void* out;
    int64_t sizes[4], a_strides[4], b_strides[4], out_strides[4];
    int64_t kind, a_dtype, b_dtype, out_dtype;
} QuireStrided;
QUIRE_API void quire_strided(const QuireStrided* call);
// Elements of 1, 2, 4 or 8 bytes, moved as they are.
typedef struct {
    const void* from;
    void* to;
    int64_t sizes[4], from_strides[4], to_strides[4], bytes;
} QuireMove;
QUIRE_API void quire_move(const QuireMove* call);
// out[i] = table[indices[i]], rows of `bytes` bytes that stand `stride` bytes apart. Returns 0, or 1 where an index lies
// outside the table's `height` rows; the rows before it are written.
QUIRE_API int32_t quire_gather_rows(const void* table, int64_t stride, int64_t height, const int64_t* indices, void* out,
                                    int64_t rows, int64_t bytes);
