// SPDX-License-Identifier: Apache-2.0
// Vec of 16 floats: AVX-512 F, BW, DQ and VL. No fused multiply-add, see vec_avx2.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

struct Vec {
    enum { width = 16 };
    __m512 v;

    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
    void store(float *p) const { _mm512_storeu_ps(p, v); }
};

inline void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }

inline Vec sign(Vec a) {
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1);
    const __m512 up = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, zero, _CMP_GT_OQ), one);
    return {_mm512_mask_sub_ps(up, _mm512_cmp_ps_mask(a.v, zero, _CMP_LT_OQ), zero, one)};
}

inline Vec widen_bf16(const uint16_t *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

inline Vec widen_f16(const uint16_t *p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))};
}

// Not the AVX512_BF16 instruction: it takes subnormals for zero.
inline void narrow_bf16(Vec a, uint16_t *p) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

inline void narrow_f16(Vec a, uint16_t *p) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

struct Squares {
    __m512d lane[4];

    static Squares zero() {
        Squares s;
        for (int i = 0; i < 4; ++i) s.lane[i] = _mm512_setzero_pd();
        return s;
    }
    void add(const float *p) {
        for (int i = 0; i < 4; ++i) {
            const __m512d x = _mm512_cvtps_pd(_mm256_loadu_ps(p + 8 * i));
            lane[i] = _mm512_add_pd(lane[i], _mm512_mul_pd(x, x));
        }
    }
    void store(double *out) const {
        for (int i = 0; i < 4; ++i) _mm512_storeu_pd(out + 8 * i, lane[i]);
    }
};

}  // namespace
