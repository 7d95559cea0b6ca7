// The file with the instructions of a machine in it (integers.h has those for integers). Everything else is written with
// the few names below and is compiled once per instruction-set level; the level is chosen by the build with one of
//     QUIRE_AVX512BF16 (AVX-512 with BF16 and VNNI)   QUIRE_AVX512   QUIRE_AVX2 (with FMA)   none (plain C++)
//
//   F                     W floats                 load, store, set1, add, sub, mul, div, fma, max, min, select_lt ...
//   I                     W 32-bit integers        only here and in integers.h
//   bf16                  the upper half of a float; load(const bf16*) widens, store(bf16*, F) rounds to nearest even
//   even(p), odd(p)       2W bf16 in memory as W floats each: element 2i, element 2i + 1
//
// No operation here depends on its neighbours or on alignment, and sums over lanes have one fixed order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(QUIRE_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#include "simde_gaps.h"
#elif defined(QUIRE_AVX2) || defined(QUIRE_AVX512) || defined(QUIRE_AVX512BF16)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define QUIRE_INLINE inline __attribute__((always_inline))

namespace quire {

struct bf16 {
    uint16_t bits;
};

QUIRE_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

QUIRE_INLINE float to_float(float x) { return x; }
QUIRE_INLINE float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

template <class T>
T from_float(float x);
template <>
QUIRE_INLINE float from_float<float>(float x) {
    return x;
}
template <>
QUIRE_INLINE bf16 from_float<bf16>(float x) {
    if (x != x) return bf16{0x7fc0};
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#if defined(QUIRE_AVX512) || defined(QUIRE_AVX512BF16)  // ------------------------------------------- AVX-512

constexpr int W = 16;
using F = __m512;
using I = __m512i;

QUIRE_INLINE F set1(float x) { return _mm512_set1_ps(x); }
QUIRE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
QUIRE_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
QUIRE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
QUIRE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
QUIRE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
QUIRE_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
QUIRE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
QUIRE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
QUIRE_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
QUIRE_INLINE F zero_unless(bool keep, F x) { return _mm512_maskz_mov_ps(__mmask16(keep ? 0xffff : 0), x); }
QUIRE_INLINE F select_lt(F a, F b, F yes, F no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
}
QUIRE_INLINE unsigned mask_ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// `yes` in the lanes whose bits are set; the lowest is that of lane 0.
QUIRE_INLINE F select_bits(unsigned bits, F yes, F no) { return _mm512_mask_mov_ps(no, __mmask16(bits), yes); }
QUIRE_INLINE F round_whole(F x) {
    F magic = set1(12582912.0f);
    return sub(add(x, magic), magic);
}
QUIRE_INLINE F power_of_two(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
QUIRE_INLINE F load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
QUIRE_INLINE F load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
QUIRE_INLINE I rounded_bits(F x) {  // the bf16 in the low half of each lane
    I bits = _mm512_castps_si512(x);
    I odd_bit = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    I up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd_bit, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}
QUIRE_INLINE void store(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded_bits(x))); }
QUIRE_INLINE F round_bf16(F x) { return _mm512_castsi512_ps(_mm512_slli_epi32(rounded_bits(x), 16)); }
QUIRE_INLINE F even(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
QUIRE_INLINE F odd(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))));
}
// Lane i is number first + i; those outside [low, high) become `fill`.
QUIRE_INLINE F keep_range(F x, int first, int low, int high, F fill) {
    I lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    I number = _mm512_add_epi32(_mm512_set1_epi32(first), lanes);
    __mmask16 inside = _mm512_cmpgt_epi32_mask(number, _mm512_set1_epi32(low - 1)) &
                       _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(high), number);
    return _mm512_mask_mov_ps(fill, inside, x);
}
#if defined(QUIRE_AVX512BF16)
// acc + w[2i] * x[0] + w[2i + 1] * x[1] in every lane i, with x the two bf16 of `pair`.
#define QUIRE_NATIVE_DOT 1
QUIRE_INLINE I load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
QUIRE_INLINE I set1_pair(uint32_t pair) { return _mm512_set1_epi32(int(pair)); }
QUIRE_INLINE F dot_pairs(F acc, I weights, I pair) {
    return _mm512_dpbf16_ps(acc, (__m512bh)weights, (__m512bh)pair);
}
#endif

#elif defined(QUIRE_AVX2)  // -------------------------------------------------------------------- AVX2 and FMA

constexpr int W = 8;
using F = __m256;
using I = __m256i;

QUIRE_INLINE F set1(float x) { return _mm256_set1_ps(x); }
QUIRE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
QUIRE_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
QUIRE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
QUIRE_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
QUIRE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
QUIRE_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
QUIRE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
QUIRE_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
QUIRE_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
QUIRE_INLINE F zero_unless(bool keep, F x) {
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(keep ? -1 : 0)));
}
QUIRE_INLINE F select_lt(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
QUIRE_INLINE unsigned mask_ge(F a, F b) { return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ))); }
QUIRE_INLINE F select_bits(unsigned bits, F yes, F no) {
    const I lanes = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const I set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lanes), lanes);
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(set));
}
QUIRE_INLINE F round_whole(F x) {
    F magic = set1(12582912.0f);
    return sub(add(x, magic), magic);
}
QUIRE_INLINE F power_of_two(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
QUIRE_INLINE F load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
QUIRE_INLINE F load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
QUIRE_INLINE I rounded_bits(F x) {  // the bf16 in the low half of each lane
    I bits = _mm256_castps_si256(x);
    I odd_bit = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    I up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd_bit, _mm256_set1_epi32(0x7fff))), 16);
    I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
}
QUIRE_INLINE void store(bf16* p, F x) {
    I bits = rounded_bits(x);
    I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
QUIRE_INLINE F round_bf16(F x) { return _mm256_castsi256_ps(_mm256_slli_epi32(rounded_bits(x), 16)); }
QUIRE_INLINE F even(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
}
QUIRE_INLINE F odd(const bf16* p) {
    I mask = _mm256_set1_epi32(int(0xffff0000));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), mask));
}
QUIRE_INLINE F keep_range(F x, int first, int low, int high, F fill) {
    I number = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    I inside = _mm256_and_si256(_mm256_cmpgt_epi32(number, _mm256_set1_epi32(low - 1)),
                                _mm256_cmpgt_epi32(_mm256_set1_epi32(high), number));
    return _mm256_blendv_ps(fill, x, _mm256_castsi256_ps(inside));
}

#else  // ------------------------------------------------------- plain C++: vectors of four, on any machine

constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));

QUIRE_INLINE F set1(float x) { return F{x, x, x, x}; }
QUIRE_INLINE F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
QUIRE_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
QUIRE_INLINE F add(F a, F b) { return a + b; }
QUIRE_INLINE F sub(F a, F b) { return a - b; }
QUIRE_INLINE F mul(F a, F b) { return a * b; }
QUIRE_INLINE F div(F a, F b) { return a / b; }
#if defined(__aarch64__)
QUIRE_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
QUIRE_INLINE F fma(F a, F b, F c) { return a * b + c; }
#endif
QUIRE_INLINE F choose(I mask, F yes, F no) { return (F)((mask & (I)yes) | (~mask & (I)no)); }
QUIRE_INLINE F max(F a, F b) { return choose(a > b, a, b); }
QUIRE_INLINE F min(F a, F b) { return choose(a < b, a, b); }
QUIRE_INLINE F zero_unless(bool keep, F x) { return (F)((I)x & (keep ? -1 : 0)); }
QUIRE_INLINE F select_lt(F a, F b, F yes, F no) { return choose(a < b, yes, no); }
QUIRE_INLINE unsigned mask_ge(F a, F b) {
    I m = a >= b;
    return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
}
QUIRE_INLINE F select_bits(unsigned bits, F yes, F no) {
    const I lanes = {1, 2, 4, 8};
    return choose((lanes & int(bits)) == lanes, yes, no);
}
QUIRE_INLINE F round_whole(F x) {
    F magic = set1(12582912.0f);
    return (x + magic) - magic;
}
QUIRE_INLINE F power_of_two(F n) { return (F)((__builtin_convertvector(n, I) + 127) << 23); }
QUIRE_INLINE F load(const bf16* p) {
    return (F)U{uint32_t(p[0].bits) << 16, uint32_t(p[1].bits) << 16, uint32_t(p[2].bits) << 16,
                uint32_t(p[3].bits) << 16};
}
QUIRE_INLINE F load(const int8_t* p) { return F{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
QUIRE_INLINE U rounded_bits(F x) {
    U bits = (U)x;
    U up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    U nan = (U)(x != x);
    return (nan & 0x7fc0) | (~nan & up);
}
QUIRE_INLINE void store(bf16* p, F x) {
    U bits = rounded_bits(x);
    for (int i = 0; i < W; i++) p[i].bits = uint16_t(bits[i]);
}
QUIRE_INLINE F round_bf16(F x) { return (F)(rounded_bits(x) << 16); }
QUIRE_INLINE U load_words(const bf16* p) {
    U words;
    std::memcpy(&words, p, sizeof words);
    return words;
}
QUIRE_INLINE F even(const bf16* p) { return (F)(load_words(p) << 16); }
QUIRE_INLINE F odd(const bf16* p) { return (F)(load_words(p) & 0xffff0000u); }
QUIRE_INLINE F keep_range(F x, int first, int low, int high, F fill) {
    I number = I{0, 1, 2, 3} + first;
    return choose((number >= low) & (number < high), x, fill);
}

#endif  // ----------------------------------------------------------------------- the same on every level

QUIRE_INLINE F zero() { return set1(0.0f); }

// The pointer p, which the compiler believes to depend on x: what is read through it is not read before x is there, and
// does not wait in a register that something else needs. Only where there are but 16 registers.
template <class V, class P>
QUIRE_INLINE P* after(V x, P* p) {
#if defined(__x86_64__) && !defined(QUIRE_AVX512) && !defined(QUIRE_AVX512BF16)
    __asm__("" : "+r"(p) : "x"(x));
#else
    (void)x;
#endif
    return p;
}
QUIRE_INLINE F neg(F x) { return sub(zero(), x); }

// Lanes of two vectors of 32 bits each, in the order of the indices. GCC before 12 lacks the builtin of the others.
#if defined(__clang__) || __GNUC__ >= 12
#define QUIRE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
template <class V>
struct LanesOf {
    typedef int32_t Type __attribute__((vector_size(sizeof(V))));
};
#define QUIRE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename LanesOf<decltype(a)>::Type{__VA_ARGS__})
#endif

template <int HALF, int... LANE>
QUIRE_INLINE F swap_halves(F x, std::integer_sequence<int, LANE...>) {
    return QUIRE_SHUFFLE(x, x, (LANE ^ HALF)...);
}

// All lanes in one: op(lane i, lane i + W / 2), and so on.
template <class Op>
QUIRE_INLINE float fold(F x, const Op& op) {
    constexpr auto LANES = std::make_integer_sequence<int, W>();
    if constexpr (W > 8) x = op(x, swap_halves<8>(x, LANES));
    if constexpr (W > 4) x = op(x, swap_halves<4>(x, LANES));
    x = op(x, swap_halves<2>(x, LANES));
    return op(x, swap_halves<1>(x, LANES))[0];
}

QUIRE_INLINE float reduce_add(F x) {
    return fold(x, [](F a, F b) { return add(a, b); });
}

QUIRE_INLINE float reduce_max(F x) {
    return fold(x, [](F a, F b) { return max(a, b); });
}

// The first n < W elements; the missing lanes read as 0, or are not written.
template <class T>
QUIRE_INLINE F load_some(const T* p, long n) {
    T lanes[W] = {};
    std::memcpy(lanes, p, size_t(n) * sizeof(T));
    return load(lanes);
}
template <class T>
QUIRE_INLINE void store_some(T* p, F x, long n) {
    T lanes[W];
    store(lanes, x);
    std::memcpy(p, lanes, size_t(n) * sizeof(T));
}

// What a value becomes on its way through memory as T.
template <class T>
F rounded(F x);
template <>
QUIRE_INLINE F rounded<float>(F x) {
    return x;
}
template <>
QUIRE_INLINE F rounded<bf16>(F x) {
    return round_bf16(x);
}

// As store, but what is below the smallest normal number may become 0.
template <class T>
QUIRE_INLINE void store_narrow(T* p, F x) {
    store(p, x);
}
#if defined(QUIRE_NATIVE_DOT) && !defined(QUIRE_SIMDE)
template <>
QUIRE_INLINE void store_narrow<bf16>(bf16* p, F x) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

// e^r for |r| <= ln(2) / 2, to about one unit in the last place.
QUIRE_INLINE F exp_small(F r) {
    F p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    return add(fma(p, mul(r, r), r), set1(1.0f));
}

// Where there is nothing left of it the result is exactly 0 (so exp2(-inf) is too), from 2^128 on it is inf; NaN stays NaN.
QUIRE_INLINE F exp2(F x) {
#if defined(QUIRE_AVX512) || defined(QUIRE_AVX512BF16)
    x = max(set1(-200.0f), min(set1(128.0f), x));
    const F n = _mm512_roundscale_ps(x, 8), r = sub(x, n);
#else
    x = max(set1(-127.0f), min(set1(128.0f), x));
    const F n = round_whole(x), r = sub(x, n);
#endif
    F p = fma(set1(1.326473133e-3f), r, set1(9.671513410e-3f));
    p = fma(p, r, set1(5.550733728e-2f));
    p = fma(p, r, set1(2.402224207e-1f));
    p = fma(p, r, set1(6.931469776e-1f));
    p = fma(p, r, set1(1.0f));
#if defined(QUIRE_AVX512) || defined(QUIRE_AVX512BF16)
    return _mm512_scalef_ps(p, n);
#else
    return mul(p, power_of_two(n));
#endif
}

// From e^88.4 on the result is inf; below e^-87.3 it stays at that, about 1e-38. NaN stays NaN.
QUIRE_INLINE F exp(F x) {
    x = max(set1(-87.3f), min(set1(88.8f), x));
    F n = round_whole(mul(x, set1(1.44269504f)));
    F r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    return mul(exp_small(r), power_of_two(n));
}

QUIRE_INLINE F tanh(F x) {
    F e = exp(mul(x, set1(2.0f)));
    return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

}  // namespace quire
