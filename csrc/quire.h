// The C interface of the kernels: plain functions on pointers and sizes, the same in the library of every level.
//
// `dtype` is 0 for float32 and 1 for bfloat16; strides and sizes count elements. Every output belongs to the caller and
// overlaps no input. Nothing is checked here: the Python side does that. What each op means is written in
// src/quire/kernels/reference.py.
#pragma once

#include <stdint.h>

#define QUIRE_API extern "C" __attribute__((visibility("default")))

enum { QUIRE_FLOAT32 = 0, QUIRE_BFLOAT16 = 1, QUIRE_INT8 = 2 };  // int8: only of a cache

// ---- the team (threads.cpp)
QUIRE_API void quire_set_threads(int32_t size);

// ---- linear.cpp. Elements of packed weights; both layouts are drawn there, packing.h makes them.
QUIRE_API int64_t quire_packed_size(int32_t dtype, int64_t n, int64_t k);
QUIRE_API void quire_unpack_linear(int32_t dtype, const void* packed, int64_t n, int64_t k, void* weight);
QUIRE_API void quire_linear(int32_t dtype, const void* x, int64_t x_stride, const void* packed, const void* bias,
                            void* out, int64_t m, int64_t n, int64_t k);

// ---- quantized.cpp. Weights of 8 bits with a scale per output, or of 4 bits with a bf16 scale, and where zero_points is
// not 0 also a zero point, per output and group of k. values int8 [n][k], scales [n][groups], zeros [n][groups] or null.
typedef struct {
    int32_t bits, zero_points;
    int64_t group, n, k;  // group: a multiple of 32; not used with 8 bits
} QuireQuantized;
QUIRE_API int64_t quire_quantized_size(const QuireQuantized* weight);
QUIRE_API void quire_pack_quantized(const QuireQuantized* weight, const int8_t* values, const float* scales,
                                    const uint8_t* zeros, void* packed);
QUIRE_API void quire_unpack_quantized(const QuireQuantized* weight, void* packed, int8_t* values, float* scales,
                                      uint8_t* zeros);
QUIRE_API void quire_quantized_linear(const QuireQuantized* weight, int32_t dtype, const void* x, int64_t x_stride,
                                      const void* packed, const void* bias, void* out, int64_t m);
// The same of the rows that quire_rms_norm, quire_layer_norm or quire_gated (below) would give, to the bit. normed: null, or
// where the rows of the norm go.
QUIRE_API void quire_rms_norm_quantized_linear(int32_t dtype, const void* x, int64_t stride, const void* residual,
                                               const void* scale, void* normed, void* total, int64_t m, int64_t dim,
                                               float eps, int32_t style, const QuireQuantized* weight,
                                               const void* packed, const void* bias, void* out);
QUIRE_API void quire_layer_norm_quantized_linear(int32_t dtype, const void* x, int64_t stride, const void* scale,
                                                 const void* shift, void* normed, int64_t m, int64_t dim, float eps,
                                                 const QuireQuantized* weight, const void* packed, const void* bias,
                                                 void* out);
QUIRE_API void quire_gated_quantized_linear(int32_t dtype, const void* gate, const void* up, int64_t stride, int64_t m,
                                            int64_t dim, int32_t activation, const QuireQuantized* weight,
                                            const void* packed, const void* bias, void* out);

// ---- cache.cpp, attention.cpp. A cache of one layer; pages.h draws a page. Keys, values, queries and results are of the
// cache's dtype, with int8 of the dtype `rows`. shared: values are the first value_dim elements of the keys; what is given
// as value is not used, and quire_page_size is asked with a value_dim of 0.
typedef struct {
    void* data;
    int64_t page_size;
    int64_t kv_heads;
    int64_t key_dim;
    int64_t value_dim;
    int32_t dtype, rows, shared;
} QuireCache;

QUIRE_API int64_t quire_page_size(int32_t dtype, int64_t page_size, int64_t kv_heads, int64_t key_dim,
                                  int64_t value_dim);
QUIRE_API void quire_write_cache(const QuireCache* cache, const void* key, int64_t key_stride, const void* value,
                                 int64_t value_stride, const int64_t* slots, int64_t tokens);

// Pages of page_bytes each: pairs are source and target, copied in their order.
QUIRE_API void quire_copy_pages(void* data, int64_t page_bytes, const int64_t* pairs, int64_t count);

// `style` 0 turns halves, 1 neighbours. angles_dtype is that of cos and sin, which are [tokens, rotated].
// With a cache the turned key and the value are written to it and key_out is not used.
typedef struct {
    const void *query, *key, *value, *cos, *sin;
    void *query_out, *key_out;
    const QuireCache* cache;
    const int64_t* slots;
    int64_t query_stride, key_stride, value_stride;
    int64_t tokens, heads, kv_heads, dim, rotated;
    int32_t dtype, angles_dtype, style;
} QuireRotary;
QUIRE_API void quire_rotary(const QuireRotary* call);

typedef struct {
    const void* query;
    void* out;
    const QuireCache* cache;
    const int32_t *tables, *starts, *lengths;
    const float* sinks;  // [heads] or null
    int64_t query_stride, table_stride, sequences, heads;
    int64_t window, chunk;  // 0: none
    float scale, softcap;   // softcap 0: none
} QuireAttention;
QUIRE_API void quire_attention(const QuireAttention* call);

// ---- attention_heads.cpp. A matrix of n x k for each head, all of them packed as one of (heads * n) x k; n is a multiple
// of 16, of which `width` results are written. Rows and heads stand apart by their strides.
typedef struct {
    const void *x, *packed;
    void* out;
    int64_t x_row, x_head, out_row, out_head;
    int64_t rows, heads, width, n, k;
    int32_t dtype;
} QuireHeads;
QUIRE_API void quire_heads_linear(const QuireHeads* call);

// ---- rows.cpp. norm style: 0 down_then_scale, 1 scale_then_down, 2 plus_one, 3 no weight. residual: null, or added to
// x first, the sum going to total. activation: see the enum in rows.h.
QUIRE_API void quire_rms_norm(int32_t dtype, const void* x, int64_t stride, const void* residual, const void* weight,
                              void* out, void* total, int64_t rows, int64_t dim, float eps, int32_t style);
QUIRE_API void quire_layer_norm(int32_t dtype, const void* x, int64_t stride, const void* weight, const void* bias,
                                void* out, int64_t rows, int64_t dim, float eps);
QUIRE_API void quire_gated(int32_t dtype, const void* gate, const void* up, int64_t stride, void* out, int64_t rows,
                           int64_t dim, int32_t activation);

// ---- experts.cpp. Gated blocks of one shape: up gives 2 * inner outputs, the gate first. All packed in one dtype, or
// quantized in one way, which up and down then say.
typedef struct {
    const void *up, *up_bias, *down, *down_bias;
} QuireExpert;
typedef struct {
    const QuireExpert* experts;
    const QuireQuantized *up, *down;  // null: not quantized
    const void* x;
    const int64_t* chosen;  // [rows][choices]; a number outside the experts adds nothing
    const float* weights;   // [rows][choices]
    void* out;              // [rows][size]
    int64_t x_stride, rows, choices, count, size, inner;
    int32_t dtype, activation;
} QuireExperts;
QUIRE_API void quire_experts(const QuireExperts* call);

// ---- sampling.cpp. A row with NaN in it, or whose largest logit is not finite, gets -1.
QUIRE_API void quire_argmax(int32_t dtype, const void* logits, int64_t stride, int64_t* out, int64_t rows,
                            int64_t vocab);
QUIRE_API void quire_uniform(const int64_t* seeds, const int64_t* positions, double* out, int64_t rows);
QUIRE_API void quire_sample(int32_t dtype, const void* logits, int64_t stride, const float* temperature,
                            const int64_t* top_k, const float* top_p, const float* min_p, const double* uniform,
                            int64_t* out, int64_t rows, int64_t vocab);

// What log-probabilities are made of, for each row: log(sum(exp(logits))), how many logits are at least that of `chosen`,
// and the ids of the `count` largest.
typedef struct {
    const void* logits;
    const int64_t* chosen;
    double* log_sums;       // [rows]
    int64_t *ranks, *best;  // [rows], [rows][count]
    int64_t stride, count, rows, vocab;
    int32_t dtype;
} QuireRank;
QUIRE_API void quire_rank(const QuireRank* call);

// ---- scores.cpp. Contiguous float32 [..][vocab], made from logits and changed in place.
QUIRE_API void quire_scores(int32_t dtype, const void* logits, int64_t stride, float* out, int64_t rows, int64_t vocab);
// Adds minus infinity to the tokens of row rows[i] whose bits in allowed[i][words] are 0.
QUIRE_API void quire_forbid(float* scores, const int32_t* allowed, int64_t words, const int64_t* rows, int64_t count,
                            int64_t vocab);

// Penalties on some rows, in place. Item i: row rows[i], and of the tokens [slot][width] those of slots[i] before ends[i];
// the prompt ends at firsts[i].
typedef struct {
    float* logits;
    const int32_t* tokens;
    const int64_t *rows, *slots, *firsts, *ends;
    const float *repetition, *presence, *frequency;
    int64_t vocab, width, count;
} QuirePenalties;
QUIRE_API void quire_penalize(const QuirePenalties* call);

// ---- ceilings.cpp: what the machine can do at best
QUIRE_API float quire_read_memory(const float* data, int64_t floats);
// `rounds` times 12 vector products per thread on operands of a dtype, from registers only: the operations done.
QUIRE_API double quire_multiply_registers(int32_t dtype, int64_t rounds);

// ---- level.cpp: 0 plain, 1 AVX2 and FMA, 2 AVX-512, 3 AVX-512 with BF16 and VNNI.
QUIRE_API int32_t quire_best_level(void);
