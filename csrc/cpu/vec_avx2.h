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

// Two vectors of results of arithmetic: a NaN among them is quiet and keeps its high half. In 16-bit lanes, twice as
// many at a time: the carry of rounding is the top bit of the mean of the low half and 0x7fff (+ 1 for odd ones).
inline void narrow_bf16_pair(Vec a, Vec b, uint16_t *p) {
    const __m256i x = _mm256_castps_si256(a.v), y = _mm256_castps_si256(b.v);
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi16(1);
    const __m256i high = _mm256_packus_epi32(_mm256_srli_epi32(x, 16), _mm256_srli_epi32(y, 16));
    const __m256i low = _mm256_packus_epi32(_mm256_blend_epi16(x, zero, 0xaa),
                                            _mm256_blend_epi16(y, zero, 0xaa));
    const __m256i half = _mm256_add_epi16(_mm256_and_si256(high, one), _mm256_set1_epi16(0x7ffe));
    const __m256i carry = _mm256_srli_epi16(_mm256_avg_epu16(low, half), 15);
    const __m256i nan = _mm256_cmpgt_epi16(_mm256_and_si256(high, _mm256_set1_epi16(0x7fff)),
                                           _mm256_set1_epi16(0x7f80));
    const __m256i rounded = _mm256_add_epi16(high, _mm256_andnot_si256(nan, carry));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(rounded, 0xd8));
}

inline void widen_bf16_pair(const uint16_t *p, Vec &a, Vec &b) {
    const __m256i sixteen = _mm256_loadu_si256((const __m256i *)p), zero = _mm256_setzero_si256();
    const __m256i order = _mm256_permute4x64_epi64(sixteen, 0xd8);
    a = {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, order))};
    b = {_mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, order))};
}

// As many 32-bit integers; arithmetic wraps, shifts are logical.
struct Ints {
    __m256i v;

    static Ints all(int32_t x) { return {_mm256_set1_epi32(x)}; }
    static Ints load(const uint32_t *p) { return {_mm256_loadu_si256((const __m256i *)p)}; }
    static Ints bytes(const uint8_t *p) {
        return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))};
    }
    static Ints words(const uint16_t *p) {
        return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p))};
    }
    void store_bytes(uint8_t *p) const {
        const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                              0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i four = _mm256_shuffle_epi8(v, pick);
        _mm_storel_epi64((__m128i *)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(four),
                                                          _mm256_extracti128_si256(four, 1)));
    }
    void store_words(uint16_t *p) const {
        const __m256i whole = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(whole, whole), 0xd8);
        _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
    }
};

struct Mask {
    __m256 v;
};

inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Ints left(Ints a, int n) { return {_mm256_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline Ints right(Ints a, int n) { return {_mm256_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline Ints right_each(Ints a, Ints n) { return {_mm256_srlv_epi32(a.v, n.v)}; }
inline Ints bits(Vec a) { return {_mm256_castps_si256(a.v)}; }
inline Vec floats(Ints a) { return {_mm256_castsi256_ps(a.v)}; }
inline Vec to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }

// The second where one is NaN.
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask less(Ints a, Ints b) {
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))};
}
inline Mask unordered(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
inline Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
inline bool any(Mask a) { return _mm256_movemask_ps(a.v) != 0; }
inline Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
inline Ints select(Mask m, Ints a, Ints b) { return bits(select(m, floats(a), floats(b))); }

// The largest lane of a vector without NaN.
inline float highest(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// The values of codes 0 to 15.
struct Table {
    __m256 low, high;

    explicit Table(const float *sixteen)
        : low(_mm256_loadu_ps(sixteen)), high(_mm256_loadu_ps(sixteen + 8)) {}
    Vec operator[](Ints codes) const {
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes.v, 28));  // 8: the sign
        return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes.v),
                                 _mm256_permutevar8x32_ps(high, codes.v), upper)};
    }
};

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
