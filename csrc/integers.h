// The integer half of simd.h: exact products of small integers, summed in 32 bits. Every level gives the same sums.
//
//   bytes      int8 weights times int8 values, in runs of BYTE_DEPTH values of k per column: pairs that are widened to 16
//              bits, or quads where the machine has VNNI, which wants unsigned weights: they are stored BYTE_OFFSET higher
//   nibbles    weights 0..15 times int8 values, in quads of k per column; the low nibbles of a byte belong to one quad, the
//              high ones to the next. Where NIBBLE_WIDE is false a dot product sums in 16 bits, in which NIBBLE_CHUNK values
//              of k fit: 32 / 4 * 2 * 15 * 127 = 30480.
#pragma once

#include <cmath>

#include "simd.h"

namespace quire {

constexpr int NIBBLE_CHUNK = 32;

#if defined(QUIRE_AVX512) || defined(QUIRE_AVX512BF16)  // ------------------------------------------- AVX-512

QUIRE_INLINE I set1_int(int32_t x) { return _mm512_set1_epi32(x); }
QUIRE_INLINE I add_ints(I a, I b) { return _mm512_add_epi32(a, b); }
QUIRE_INLINE I mul_ints(I a, I b) { return _mm512_mullo_epi32(a, b); }
QUIRE_INLINE F float_of(I x) { return _mm512_cvtepi32_ps(x); }
QUIRE_INLINE I widen_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
// W bytes, each the integer nearest to x, ties to even; |x| is below 127.5.
QUIRE_INLINE void store_bytes(int8_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
QUIRE_INLINE I load_nibbles(const uint8_t* p) { return _mm512_loadu_si512(p); }
QUIRE_INLINE I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
QUIRE_INLINE I high_nibbles(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
#if defined(QUIRE_AVX512BF16)
constexpr int BYTE_DEPTH = 4;
constexpr int BYTE_OFFSET = 128;
QUIRE_INLINE I byte_weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
// The sums are added to in place, by name: left to itself the compiler copies each of them at every step.
QUIRE_INLINE I byte_dot(I sum, I weights, I values) {
#if defined(QUIRE_SIMDE)
    return _mm512_dpbusd_epi32(sum, weights, values);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(values));
    return sum;
#endif
}
constexpr bool NIBBLE_WIDE = true;
QUIRE_INLINE I nibble_dot(I sum, I weights, I values) { return byte_dot(sum, weights, values); }
QUIRE_INLINE I nibble_sum(I sum, I part) { return add_ints(sum, part); }
#else
constexpr bool NIBBLE_WIDE = false;
constexpr int BYTE_DEPTH = 2;
constexpr int BYTE_OFFSET = 0;
QUIRE_INLINE I byte_weights(const uint8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
QUIRE_INLINE I byte_dot(I sum, I weights, I values) { return add_ints(sum, _mm512_madd_epi16(weights, values)); }
QUIRE_INLINE I nibble_dot(I part, I weights, I values) {
    return _mm512_add_epi16(part, _mm512_maddubs_epi16(weights, values));
}
QUIRE_INLINE I nibble_sum(I sum, I part) { return add_ints(sum, _mm512_madd_epi16(part, _mm512_set1_epi16(1))); }
#endif

#elif defined(QUIRE_AVX2)  // -------------------------------------------------------------------- AVX2 and FMA

constexpr int BYTE_DEPTH = 2;
constexpr int BYTE_OFFSET = 0;
QUIRE_INLINE I set1_int(int32_t x) { return _mm256_set1_epi32(x); }
QUIRE_INLINE I add_ints(I a, I b) { return _mm256_add_epi32(a, b); }
QUIRE_INLINE I mul_ints(I a, I b) { return _mm256_mullo_epi32(a, b); }
QUIRE_INLINE F float_of(I x) { return _mm256_cvtepi32_ps(x); }
QUIRE_INLINE I widen_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
QUIRE_INLINE void store_bytes(int8_t* p, F x) {
    const I whole = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
QUIRE_INLINE I byte_weights(const uint8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
// The sums are added to in place, by name: left to itself the compiler keeps two registers for each, and has not so many.
QUIRE_INLINE I byte_dot(I sum, I weights, I values) {
    const I products = _mm256_madd_epi16(weights, values);
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
}
QUIRE_INLINE I load_nibbles(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
QUIRE_INLINE I low_nibbles(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
QUIRE_INLINE I high_nibbles(I x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
constexpr bool NIBBLE_WIDE = false;
QUIRE_INLINE I nibble_dot(I part, I weights, I values) {
    const I products = _mm256_maddubs_epi16(weights, values);
    __asm__("vpaddw %1, %0, %0" : "+x"(part) : "x"(products));
    return part;
}
QUIRE_INLINE I nibble_sum(I sum, I part) { return add_ints(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1))); }

#else  // ------------------------------------------------------- plain C++: vectors of four, on any machine

constexpr int BYTE_DEPTH = 2;
constexpr int BYTE_OFFSET = 0;
typedef int8_t Bytes __attribute__((vector_size(16)));
QUIRE_INLINE I set1_int(int32_t x) { return I{x, x, x, x}; }
QUIRE_INLINE I add_ints(I a, I b) { return a + b; }
QUIRE_INLINE I mul_ints(I a, I b) { return a * b; }
QUIRE_INLINE F float_of(I x) { return __builtin_convertvector(x, F); }
QUIRE_INLINE I widen_bytes(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
QUIRE_INLINE void store_bytes(int8_t* p, F x) {
    const I whole = __builtin_convertvector(round_whole(x), I);
    for (int i = 0; i < W; i++) p[i] = int8_t(whole[i]);
}
// Pairs of weights as two 16-bit halves of each lane.
QUIRE_INLINE I byte_weights(const uint8_t* p) {
    const int8_t* w = reinterpret_cast<const int8_t*>(p);
    I out;
    for (int i = 0; i < W; i++) out[i] = int32_t(uint32_t(w[2 * i + 1]) << 16 | uint16_t(w[2 * i]));
    return out;
}
QUIRE_INLINE I byte_dot(I sum, I weights, I values) {
    const I low = ((weights << 16) >> 16) * ((values << 16) >> 16);
    return sum + low + (weights >> 16) * (values >> 16);
}
QUIRE_INLINE I load_nibbles(const uint8_t* p) {
    I x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
QUIRE_INLINE I low_nibbles(I x) { return x & 0x0f0f0f0f; }
QUIRE_INLINE I high_nibbles(I x) { return (x >> 4) & 0x0f0f0f0f; }
constexpr bool NIBBLE_WIDE = true;
QUIRE_INLINE I nibble_dot(I part, I weights, I values) {
    for (int shift = 0; shift < 32; shift += 8) part += ((weights >> shift) & 15) * ((values << (24 - shift)) >> 24);
    return part;
}
QUIRE_INLINE I nibble_sum(I sum, I part) { return sum + part; }

#endif

// Rounds k values to bytes: x is near q * scale. A row with inf or NaN in it gets a scale of NaN. Returns the sum of q.
template <class T>
int32_t round_values(const T* x, long k, int8_t* q, float* scale) {
    F most = set1(0), bad = set1(0);
    long at = 0;
    auto look = [&](F v) {
        most = max(most, max(v, sub(set1(0), v)));
        bad = add(bad, mul(v, set1(0)));
    };
    for (; at + W <= k; at += W) look(load(x + at));
    if (at < k) look(load_some(x + at, k - at));
    const float largest = reduce_max(most);
    const bool finite = reduce_add(bad) == 0 && largest >= 1e-30f;  // below, 127 / largest is not safe: nothing is left
    *scale = reduce_add(bad) == 0 ? (finite ? largest / 127.0f : 0.0f) : NAN;
    const F factor = set1(finite ? 127.0f / largest : 0.0f);
    int32_t sum = 0;
    if (!finite) {
        std::memset(q, 0, size_t(k));
        return 0;
    }
    for (at = 0; at + W <= k; at += W) store_bytes(q + at, mul(load(x + at), factor));
    if (at < k) {
        int8_t rest[W];
        store_bytes(rest, mul(load_some(x + at, k - at), factor));
        std::memcpy(q + at, rest, size_t(k - at));
    }
    for (at = 0; at < k; at++) sum += q[at];
    return sum;
}

// The word of A that stands for BYTE_DEPTH values of k of one row.
QUIRE_INLINE uint32_t byte_word(const int8_t* q) {
    uint32_t word;
    if constexpr (BYTE_DEPTH == 2)
        word = uint32_t(uint16_t(int16_t(q[0]))) | uint32_t(uint16_t(int16_t(q[1]))) << 16;
    else
        std::memcpy(&word, q, 4);
    return word;
}

}  // namespace quire
