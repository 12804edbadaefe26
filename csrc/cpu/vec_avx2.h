// SPDX-License-Identifier: Apache-2.0
// Vec of 8 floats: AVX2 with F16C. No fused multiply-add: its other last bits would differ between machines.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

struct Vec {
    enum { width = 8 };
    __m256 v;

    static Vec all(float x) { return {_mm256_set1_ps(x)}; }
    static Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
    void store(float *p) const { _mm256_storeu_ps(p, v); }
};

inline void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }

inline Vec sign(Vec a) {
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1);
    const __m256 up = _mm256_and_ps(_mm256_cmp_ps(a.v, zero, _CMP_GT_OQ), one);
    const __m256 down = _mm256_and_ps(_mm256_cmp_ps(a.v, zero, _CMP_LT_OQ), one);
    return {_mm256_sub_ps(up, down)};
}

inline Vec widen_bf16(const uint16_t *p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}

inline Vec widen_f16(const uint16_t *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p))};
}

inline void narrow_bf16(Vec a, uint16_t *p) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    const __m256i chosen = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}

inline void narrow_f16(Vec a, uint16_t *p) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

struct Squares {
    __m256d lane[8];

    static Squares zero() {
        Squares s;
        for (int i = 0; i < 8; ++i) s.lane[i] = _mm256_setzero_pd();
        return s;
    }
    void add(const float *p) {
        for (int i = 0; i < 8; ++i) {
            const __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(p + 4 * i));
            lane[i] = _mm256_add_pd(lane[i], _mm256_mul_pd(x, x));
        }
    }
    void store(double *out) const {
        for (int i = 0; i < 8; ++i) _mm256_storeu_pd(out + 4 * i, lane[i]);
    }
};

}  // namespace
