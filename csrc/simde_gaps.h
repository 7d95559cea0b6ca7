// The few AVX-512 conversions that simd.h uses and SIMDe lacks, element by element. Only for the emulated builds.
#pragma once

#include <cmath>

namespace quire {

inline __m512i emulated_cvtps_epi32(__m512 x) {
    float in[16];
    int32_t out[16];
    _mm512_storeu_ps(in, x);
    for (int i = 0; i < 16; i++) out[i] = int32_t(std::nearbyintf(in[i]));
    return _mm512_loadu_si512(out);
}

inline __m512i emulated_cvtepu16_epi32(__m256i x) {
    uint16_t in[16];
    uint32_t out[16];
    _mm256_storeu_si256((__m256i*)in, x);
    for (int i = 0; i < 16; i++) out[i] = in[i];
    return _mm512_loadu_si512(out);
}

inline __m256i emulated_cvtepi32_epi16(__m512i x) {
    uint32_t in[16];
    uint16_t out[16];
    _mm512_storeu_si512(in, x);
    for (int i = 0; i < 16; i++) out[i] = uint16_t(in[i]);
    return _mm256_loadu_si256((const __m256i*)out);
}

inline __m512 emulated_cvtepi32_ps(__m512i x) {
    int32_t in[16];
    float out[16];
    _mm512_storeu_si512(in, x);
    for (int i = 0; i < 16; i++) out[i] = float(in[i]);
    return _mm512_loadu_ps(out);
}

inline __m512i emulated_cvtepu8_epi32(__m128i x) {
    uint8_t in[16];
    uint32_t out[16];
    _mm_storeu_si128((__m128i*)in, x);
    for (int i = 0; i < 16; i++) out[i] = in[i];
    return _mm512_loadu_si512(out);
}

inline __m512i emulated_cvtepi8_epi32(__m128i x) {
    int8_t in[16];
    int32_t out[16];
    _mm_storeu_si128((__m128i*)in, x);
    for (int i = 0; i < 16; i++) out[i] = in[i];
    return _mm512_loadu_si512(out);
}

}  // namespace quire

#undef _mm512_madd_epi16  // SIMDe's own alias takes the arguments of the masked one
#define _mm512_madd_epi16 simde_mm512_madd_epi16
#define _mm512_cvtepi32_ps quire::emulated_cvtepi32_ps
#define _mm512_cvtepu8_epi32 quire::emulated_cvtepu8_epi32
#define _mm512_cvtps_epi32 quire::emulated_cvtps_epi32
#define _mm512_cvtepu16_epi32 quire::emulated_cvtepu16_epi32
#define _mm512_cvtepi32_epi16 quire::emulated_cvtepi32_epi16
#define _mm512_cvtepi8_epi32 quire::emulated_cvtepi8_epi32
