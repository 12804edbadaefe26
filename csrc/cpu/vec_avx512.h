// SPDX-License-Identifier: Apache-2.0
// Vec of 16 floats: AVX-512 F, BW, DQ and VL. Sums are fused with products as seldom as in vec_avx2.h.
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
// a * b + c where the product is exact.
inline Vec exact_sum(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// See [Note: quotients without division] in vec_avx2.h.
struct Divisor {
    Vec by, inverse, rest;

    explicit Divisor(Vec x) : by(x), inverse(Vec::all(1) / x) {
        rest = {_mm512_mul_ps(_mm512_fnmadd_ps(inverse.v, by.v, _mm512_set1_ps(1)), inverse.v)};
    }
    Vec close(Vec x) const {
        return {_mm512_fmadd_ps(x.v, inverse.v, _mm512_mul_ps(x.v, rest.v))};
    }
    Vec exact(Vec x) const {
        const Vec q = close(x);
        return {_mm512_fmadd_ps(_mm512_fnmadd_ps(q.v, by.v, x.v), inverse.v, q.v)};
    }
};

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

// The upper halves of two vectors, one behind the other, and what rounding adds to each.
inline void bf16_pair(Vec a, Vec b, __m512i &high, __m512i &carry) {
    const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(b.v);
    const __m512i even = _mm512_set_epi16(
        62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18,
        16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i low = _mm512_permutex2var_epi16(x, even, y);
    high = _mm512_permutex2var_epi16(x, _mm512_or_si512(even, one), y);
    const __m512i half = _mm512_add_epi16(_mm512_and_si512(high, one), _mm512_set1_epi16(0x7ffe));
    carry = _mm512_srli_epi16(_mm512_avg_epu16(low, half), 15);
}

// Two vectors of results of arithmetic, see vec_avx2.h.
inline __m512i round_bf16_pair(Vec a, Vec b) {
    __m512i high, carry;
    bf16_pair(a, b, high, carry);
    const __mmask32 number = _mm512_cmple_epu16_mask(
        _mm512_and_si512(high, _mm512_set1_epi16(0x7fff)), _mm512_set1_epi16(0x7f80));
    return _mm512_mask_add_epi16(high, number, high, carry);
}

inline void narrow_bf16_pair(Vec a, Vec b, uint16_t *p) {
    _mm512_storeu_si512((void *)p, round_bf16_pair(a, b));
}

inline void widen_bf16_pair(const uint16_t *p, Vec &a, Vec &b) {
    a = widen_bf16(p);
    b = widen_bf16(p + Vec::width);
}

// Leaves in a and b what was stored.
inline void keep_bf16_pair(Vec &a, Vec &b, uint16_t *p) {
    const __m512i pair = round_bf16_pair(a, b);
    _mm512_storeu_si512((void *)p, pair);
    const __m512i x = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(pair));
    const __m512i y = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pair, 1));
    a = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
    b = {_mm512_castsi512_ps(_mm512_slli_epi32(y, 16))};
}

// As many 32-bit integers; arithmetic wraps, shifts are logical.
struct Ints {
    __m512i v;

    static Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Ints load(const uint32_t *p) { return {_mm512_loadu_si512((const void *)p)}; }
    static Ints bytes(const uint8_t *p) {
        return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))};
    }
    static Ints signed_bytes(const uint8_t *p) {
        return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))};
    }
    static Ints words(const uint16_t *p) {
        return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p))};
    }
    void store_bytes(uint8_t *p) const {
        _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(v));
    }
    void store_words(uint16_t *p) const {
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(v));
    }
};

struct Mask {
    __mmask16 v;
};

inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Ints left(Ints a, int n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline Ints right(Ints a, int n) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline Ints right_each(Ints a, Ints n) { return {_mm512_srlv_epi32(a.v, n.v)}; }
inline Ints bits(Vec a) { return {_mm512_castps_si512(a.v)}; }
inline Vec floats(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
inline Ints larger(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline Ints smaller(Ints a, Ints b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline Vec to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }

// The second where one is NaN.
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask less(Ints a, Ints b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
inline Mask unordered(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline Mask operator|(Mask a, Mask b) { return {(__mmask16)(a.v | b.v)}; }
inline bool any(Mask a) { return a.v != 0; }
inline Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
inline Ints select(Mask m, Ints a, Ints b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

// The greater as numbers without a sign.
inline Ints farther(Ints a, Ints b) { return {_mm512_max_epu32(a.v, b.v)}; }

// See vec_avx2.h.
inline int least_lane(Ints a, int change) {
    const __m512i x = _mm512_xor_si512(a.v, _mm512_set1_epi32(change));
    const __m256i half =
        _mm256_min_epu32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i few = _mm_min_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    few = _mm_min_epu32(few, _mm_shuffle_epi32(few, 0x4e));
    return _mm_cvtsi128_si32(_mm_min_epu32(few, _mm_shuffle_epi32(few, 0xb1))) ^ change;
}

// Twice as many 16-bit integers, with a sign where it matters.
struct Halves {
    enum { width = 2 * Vec::width };
    __m512i v;

    static Halves all(int x) { return {_mm512_set1_epi16((short)x)}; }
    static Halves load(const uint16_t *p) { return {_mm512_loadu_si512((const void *)p)}; }
    static Halves bytes(const uint8_t *p) {
        return {_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p))};
    }
    void store(uint16_t *p) const {
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        _mm512_storeu_si512((void *)p, _mm512_permutexvar_epi64(order, v));
    }
    void store_apart(uint16_t *p) const { _mm512_storeu_si512((void *)p, v); }
};

inline Halves operator+(Halves a, Halves b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline Halves operator-(Halves a, Halves b) { return {_mm512_sub_epi16(a.v, b.v)}; }
inline Halves operator&(Halves a, Halves b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Halves operator|(Halves a, Halves b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Halves left(Halves a, int n) { return {_mm512_sll_epi16(a.v, _mm_cvtsi32_si128(n))}; }
// The sign moves in.
inline Halves right(Halves a, int n) { return {_mm512_sra_epi16(a.v, _mm_cvtsi32_si128(n))}; }
inline Halves larger(Halves a, Halves b) { return {_mm512_max_epi16(a.v, b.v)}; }
inline Halves farther(Halves a, Halves b) { return {_mm512_max_epu16(a.v, b.v)}; }
inline Halves smaller(Halves a, Halves b) { return {_mm512_min_epi16(a.v, b.v)}; }

inline int least_lane(Halves a, int change) {
    const __m512i x = _mm512_xor_si512(a.v, _mm512_set1_epi16((short)(change >> 16)));
    const __m256i half =
        _mm256_min_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i few =
        _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return (int16_t)(_mm_cvtsi128_si32(_mm_minpos_epu16(few)) ^ change >> 16);
}

template <class Lanes>
inline int highest(Lanes a) { return least_lane(a, 0x7fffffff); }
template <class Lanes>
inline int lowest(Lanes a) { return least_lane(a, (int)0x80000000); }
template <class Lanes>
inline int farthest(Lanes a) { return least_lane(a, -1); }

inline void widen_f16_pair(Halves h, Vec &a, Vec &b) {
    a = {_mm512_cvtph_ps(_mm512_castsi512_si256(h.v))};
    b = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(h.v, 1))};
}

// The same as in vec_avx2.h, with twice as many lanes of 128 bits.
inline void widen_bf16_apart(Halves pair, Vec &a, Vec &b) {
    const __m512i zero = _mm512_setzero_si512();
    a = {_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, pair.v))};
    b = {_mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, pair.v))};
}
inline Halves join_halves(Ints a, Ints b, int weight) {
    const __m512i by = _mm512_set1_epi32(1 << 16 | weight);
    return {_mm512_packus_epi32(_mm512_madd_epi16(a.v, by), _mm512_madd_epi16(b.v, by))};
}
inline Halves sign_halves(Ints a, Ints b) { return {_mm512_packs_epi32(a.v, b.v)}; }

// Bytes need not be split here, see vec_avx2.h: all keep their order.
enum { kSplit = 0, kSplitSigned = 0 };
inline void split_bytes(const uint8_t *p, Ints &a, Ints &b) {
    a = Ints::bytes(p);
    b = Ints::bytes(p + Vec::width);
}
inline void split_signed_bytes(const uint8_t *p, Ints &a, Ints &b) {
    a = Ints::signed_bytes(p);
    b = Ints::signed_bytes(p + Vec::width);
}
inline void widen_bf16_split(Halves pair, Vec &a, Vec &b) {
    a = {_mm512_castsi512_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(pair.v)))};
    b = {_mm512_castsi512_ps(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pair.v, 1)))};
    a = {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))};
    b = {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(b.v), 16))};
}
inline int split_place(int i) { return i; }
inline bool roots_of_bf16(Vec &, Vec &) { return false; }
// A pair without NaN to bf16.
inline Halves narrow_bf16_split(Vec a, Vec b) {
    __m512i high, carry;
    bf16_pair(a, b, high, carry);
    return {_mm512_add_epi16(high, carry)};
}

// Four vectors of integers as bytes, in an order of their own until they are stored.
struct Bytes {
    enum { width = 4 * Vec::width };
    __m512i v;

    static Bytes all(int x) { return {_mm512_set1_epi8((char)x)}; }
    static Bytes load_apart(const uint8_t *p) {
        const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        return {_mm512_permutexvar_epi64(order, _mm512_loadu_si512((const void *)p))};
    }
    void store(uint8_t *p) const {
        const __m512i order =
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_storeu_si512((void *)p, _mm512_permutexvar_epi32(order, v));
    }
    // Of vectors that were widened apart.
    void store_apart(uint8_t *p) const {
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        _mm512_storeu_si512((void *)p, _mm512_permutexvar_epi64(order, v));
    }
};

inline Bytes operator-(Bytes a, Bytes b) { return {_mm512_sub_epi8(a.v, b.v)}; }
inline Bytes smaller(Bytes a, Bytes b) { return {_mm512_min_epu8(a.v, b.v)}; }
inline Bytes operator&(Bytes a, Bytes b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
// Bits of the neighbours move in.
inline Bytes right(Bytes a, int n) { return {_mm512_srl_epi16(a.v, _mm_cvtsi32_si128(n))}; }

inline Bytes to_bytes(Halves a, Halves b) { return {_mm512_packus_epi16(a.v, b.v)}; }
inline Bytes sign_bytes(Halves a, Halves b) { return {_mm512_packs_epi16(a.v, b.v)}; }

// See [Note: codes by saturation] in vec_avx2.h.
struct Whole {
    bool signed_bytes;  // nothing else than what saturation leaves
    Halves from;
    Bytes last, back, mask;

    Whole(float least, float, int bias, int mask_)
        : signed_bytes(least == -128 && bias == 0 && mask_ == 255),
          from(Halves::all(-(int)least)),
          last(Bytes::all(mask_)),
          back(Bytes::all(-(int)least - bias)),
          mask(Bytes::all(mask_)) {}

    Bytes operator()(Vec a, Vec b, Vec c, Vec d) const {
        const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
        const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(c.v), _mm512_cvtps_epi32(d.v));
        if (signed_bytes) return {_mm512_packs_epi16(low, high)};
        const __m512i all =
            _mm512_packus_epi16(_mm512_adds_epi16(low, from.v), _mm512_adds_epi16(high, from.v));
        const __m512i code = _mm512_sub_epi8(_mm512_min_epu8(all, last.v), back.v);
        return {_mm512_and_si512(code, mask.v)};
    }
};

// kFours codes of four bits, one a byte, into half as many bytes.
enum { kFours = 128 };
inline void join_fours(const uint8_t *codes, uint8_t *out, bool high_first) {
    const __m512i factors = _mm512_set1_epi16(high_first ? 0x0110 : 0x1001);
    const __m512i low = _mm512_maddubs_epi16(_mm512_loadu_si512((const void *)codes), factors);
    const __m512i high =
        _mm512_maddubs_epi16(_mm512_loadu_si512((const void *)(codes + 64)), factors);
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512((void *)out,
                        _mm512_permutexvar_epi64(order, _mm512_packus_epi16(low, high)));
}

// Three bytes of each 32 bits, see vec_avx2.h.
inline void store_threes(__m512i a, uint8_t *out) {
    const __m512i low = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m512i order =
        _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
    const __m512i all = _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(a, low));
    _mm256_storeu_si256((__m256i *)out, _mm512_castsi512_si256(all));
    _mm_storeu_si128((__m128i *)(out + 32), _mm512_extracti32x4_epi32(all, 2));
}
// Of two codes of 12 bits in three bytes.
inline __m512i part_twelves(const uint8_t *in) {
    // Four times twelve bytes: the last twelve end where what may be read ends.
    const __m512i order =
        _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    const __m512i all = _mm512_inserti32x4(
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)in)),
        _mm_loadu_si128((const __m128i *)(in + 32)), 2);
    const __m512i pick = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11));
    const __m512i two = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, all), pick);
    return _mm512_mask_srli_epi16(_mm512_and_si512(two, _mm512_set1_epi32(0xfff)), 0xaaaaaaaa, two,
                                  4);
}

// Codes of six and of twelve bits, see vec_avx2.h.
enum { kSixes = 64, kTwelves = 32 };
inline void join_sixes(const uint8_t *codes, uint8_t *out) {
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512((const void *)codes),
                                               _mm512_set1_epi16(0x4001));
    store_threes(_mm512_madd_epi16(pairs, _mm512_set1_epi32(0x10000001)), out);
}
inline void part_sixes(const uint8_t *in, uint8_t *codes) {
    const __m512i two = part_twelves(in);
    const __m512i low = _mm512_and_si512(_mm512_slli_epi16(two, 2), _mm512_set1_epi16(0xfc));
    const __m512i high =
        _mm512_and_si512(_mm512_slli_epi16(two, 4), _mm512_set1_epi16((short)0xfc00));
    _mm512_storeu_si512((void *)codes, _mm512_or_si512(low, high));
}
inline void join_twelves(const uint16_t *codes, uint8_t *out) {
    const __m512i two = _mm512_loadu_si512((const void *)codes);
    store_threes(_mm512_madd_epi16(two, _mm512_set1_epi32(0x10000001)), out);
}
inline void part_twelves(const uint8_t *in, uint16_t *codes) {
    _mm512_storeu_si512((void *)codes, part_twelves(in));
}

// See vec_avx2.h.
struct ByteTable {
    __m512i low, high;

    explicit ByteTable(const uint16_t *sixteen) {
        const __m256i all = _mm256_loadu_si256((const __m256i *)sixteen);
        low = _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(all));
        high = _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(_mm256_srli_epi16(all, 8)));
    }
    void look_up(Bytes at, Bytes more, Halves &a, Halves &b) const {
        join(_mm512_shuffle_epi8(low, at.v), _mm512_or_si512(_mm512_shuffle_epi8(high, at.v), more.v),
             a, b);
    }
    static void raise(Bytes upper, Halves &a, Halves &b) {
        join(_mm512_setzero_si512(), upper.v, a, b);
    }
    static void join(__m512i lower, __m512i upper, Halves &a, Halves &b) {
        a = {_mm512_unpacklo_epi8(lower, upper)};
        b = {_mm512_unpackhi_epi8(lower, upper)};
    }
};

// Sixteen 16-bit values: what packed codes of four bits stand for.
struct HalfTable {
    enum { codes = 64 };
    __m512i values;

    explicit HalfTable(const uint16_t *sixteen)
        : values(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)sixteen))) {}
    void spread(const uint8_t *packed, bool high_first, uint16_t *to) const {
        // The four-byte parts lie so that unpacking within lanes leaves all in order.
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i in =
            _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)packed), order);
        const __m512i wide = _mm512_cvtepu8_epi16(in);
        const __m512i low =
            _mm512_permutexvar_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(15)), values);
        const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), values);
        const __m512i first = high_first ? high : low, second = high_first ? low : high;
        _mm512_storeu_si512((void *)to, _mm512_unpacklo_epi16(first, second));
        _mm512_storeu_si512((void *)(to + 32), _mm512_unpackhi_epi16(first, second));
    }
};

// 64 bytes past the caches; both addresses are multiples of 64.
inline void stream_line(const char *from, char *to) {
    _mm512_stream_si512((__m512i *)to, _mm512_load_si512((const void *)from));
}
inline void settle_streams() { _mm_sfence(); }

// The values of codes 0 to 15.
struct Table {
    __m512 values;

    explicit Table(const float *sixteen) : values(_mm512_loadu_ps(sixteen)) {}
    Vec operator[](Ints codes) const { return {_mm512_permutexvar_ps(codes.v, values)}; }
};

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
            lane[i] = _mm512_fmadd_pd(x, x, lane[i]);  // exact squares
        }
    }
    void store(double *out) const {
        for (int i = 0; i < 4; ++i) _mm512_storeu_pd(out + 8 * i, lane[i]);
    }
};

}  // namespace
