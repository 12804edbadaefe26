// SPDX-License-Identifier: Apache-2.0
// Vec of 8 floats: AVX2 with F16C and FMA. No sum is fused with its product but where that changes no bit, or where the
// quotient that is told from it has the bits of a division.
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
// a * b + c where the product is exact.
inline Vec exact_sum(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// [Note: quotients without division]
// 1 / by as the sum of two floats, a large one and what it lacks, gives x / by with an error below 2^-46 of it before
// it is rounded. `exact` adds what the remainder, which one fused operation tells, leads to (Markstein): that is always
// the rounded x / by. `close` may round to the wrong side, but never beside a border between codes of up to 8 bits of
// mantissa if x is bf16: there x would have to lie within 6 units of the last of 49 places of `by` times a number whose
// 25 bits are 9, zeros, and a last one. Then `by` were a number of 8 bits but for 6 units of its last place, and its
// 8 bits, as a number, the product of those units and the 9 bits: too large.
struct Divisor {
    Vec by, inverse, rest;

    explicit Divisor(Vec x) : by(x), inverse(Vec::all(1) / x) {
        rest = {_mm256_mul_ps(_mm256_fnmadd_ps(inverse.v, by.v, _mm256_set1_ps(1)), inverse.v)};
    }
    Vec close(Vec x) const {
        return {_mm256_fmadd_ps(x.v, inverse.v, _mm256_mul_ps(x.v, rest.v))};
    }
    Vec exact(Vec x) const {
        const Vec q = close(x);
        return {_mm256_fmadd_ps(_mm256_fnmadd_ps(q.v, by.v, x.v), inverse.v, q.v)};
    }
};

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

// What rounding to bf16 adds to the upper halves of floats, from both halves.
inline __m256i bf16_carry(__m256i high, __m256i low) {
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi16(1));
    const __m256i half = _mm256_add_epi16(odd, _mm256_set1_epi16(0x7ffe));
    return _mm256_srli_epi16(_mm256_avg_epu16(low, half), 15);
}

// Two vectors of results of arithmetic, their lanes apart: a NaN among them is quiet and keeps its high half. In 16-bit lanes, twice as
// many at a time: the carry of rounding is the top bit of the mean of the low half and 0x7fff (+ 1 for odd ones).
inline __m256i round_bf16_pair(Vec a, Vec b) {
    const __m256i x = _mm256_castps_si256(a.v), y = _mm256_castps_si256(b.v);
    const __m256i zero = _mm256_setzero_si256();
    const __m256i high = _mm256_packus_epi32(_mm256_srli_epi32(x, 16), _mm256_srli_epi32(y, 16));
    const __m256i low = _mm256_packus_epi32(_mm256_blend_epi16(x, zero, 0xaa),
                                            _mm256_blend_epi16(y, zero, 0xaa));
    const __m256i nan = _mm256_cmpgt_epi16(_mm256_and_si256(high, _mm256_set1_epi16(0x7fff)),
                                           _mm256_set1_epi16(0x7f80));
    return _mm256_add_epi16(high, _mm256_andnot_si256(nan, bf16_carry(high, low)));
}

inline void narrow_bf16_pair(Vec a, Vec b, uint16_t *p) {
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(round_bf16_pair(a, b), 0xd8));
}

inline void part_bf16_pair(__m256i pair, Vec &a, Vec &b) {
    const __m256i zero = _mm256_setzero_si256();
    a = {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, pair))};
    b = {_mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, pair))};
}

inline void widen_bf16_pair(const uint16_t *p, Vec &a, Vec &b) {
    const __m256i sixteen = _mm256_loadu_si256((const __m256i *)p);
    part_bf16_pair(_mm256_permute4x64_epi64(sixteen, 0xd8), a, b);
}

// Leaves in a and b what was stored.
inline void keep_bf16_pair(Vec &a, Vec &b, uint16_t *p) {
    const __m256i pair = round_bf16_pair(a, b);
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(pair, 0xd8));
    part_bf16_pair(pair, a, b);
}

// As many 32-bit integers; arithmetic wraps, shifts are logical.
struct Ints {
    __m256i v;

    static Ints all(int32_t x) { return {_mm256_set1_epi32(x)}; }
    static Ints load(const uint32_t *p) { return {_mm256_loadu_si256((const __m256i *)p)}; }
    static Ints bytes(const uint8_t *p) {
        return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))};
    }
    static Ints signed_bytes(const uint8_t *p) {
        return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))};
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
inline Ints operator^(Ints a, Ints b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Ints left(Ints a, int n) { return {_mm256_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline Ints right(Ints a, int n) { return {_mm256_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline Ints right_each(Ints a, Ints n) { return {_mm256_srlv_epi32(a.v, n.v)}; }
inline Ints bits(Vec a) { return {_mm256_castps_si256(a.v)}; }
inline Vec floats(Ints a) { return {_mm256_castsi256_ps(a.v)}; }
inline Ints larger(Ints a, Ints b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline Ints smaller(Ints a, Ints b) { return {_mm256_min_epi32(a.v, b.v)}; }
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

// The greater as numbers without a sign.
inline Ints farther(Ints a, Ints b) { return {_mm256_max_epu32(a.v, b.v)}; }

// The least lane after a change of all that turns the order wanted into that of numbers without a sign; of narrower lanes
// its upper half.
inline int least_lane(Ints a, int change) {
    const __m256i x = _mm256_xor_si256(a.v, _mm256_set1_epi32(change));
    __m128i few = _mm_min_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    few = _mm_min_epu32(few, _mm_shuffle_epi32(few, 0x4e));
    return _mm_cvtsi128_si32(_mm_min_epu32(few, _mm_shuffle_epi32(few, 0xb1))) ^ change;
}

// Twice as many 16-bit integers, with a sign where it matters.
struct Halves {
    enum { width = 2 * Vec::width };
    __m256i v;

    static Halves all(int x) { return {_mm256_set1_epi16((short)x)}; }
    static Halves load(const uint16_t *p) { return {_mm256_loadu_si256((const __m256i *)p)}; }
    static Halves bytes(const uint8_t *p) {
        return {_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p))};
    }
    // Of two vectors, see join_halves; and of such that were widened apart.
    void store(uint16_t *p) const {
        _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(v, 0xd8));
    }
    void store_apart(uint16_t *p) const { _mm256_storeu_si256((__m256i *)p, v); }
};

inline Halves operator+(Halves a, Halves b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline Halves operator-(Halves a, Halves b) { return {_mm256_sub_epi16(a.v, b.v)}; }
inline Halves operator&(Halves a, Halves b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Halves operator|(Halves a, Halves b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Halves left(Halves a, int n) { return {_mm256_sll_epi16(a.v, _mm_cvtsi32_si128(n))}; }
// The sign moves in.
inline Halves right(Halves a, int n) { return {_mm256_sra_epi16(a.v, _mm_cvtsi32_si128(n))}; }
inline Halves larger(Halves a, Halves b) { return {_mm256_max_epi16(a.v, b.v)}; }
inline Halves farther(Halves a, Halves b) { return {_mm256_max_epu16(a.v, b.v)}; }
inline Halves smaller(Halves a, Halves b) { return {_mm256_min_epi16(a.v, b.v)}; }

inline int least_lane(Halves a, int change) {
    const __m256i x = _mm256_xor_si256(a.v, _mm256_set1_epi16((short)(change >> 16)));
    const __m128i half = _mm_min_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    return (int16_t)(_mm_cvtsi128_si32(_mm_minpos_epu16(half)) ^ change >> 16);
}

template <class Lanes>
inline int highest(Lanes a) { return least_lane(a, 0x7fffffff); }
template <class Lanes>
inline int lowest(Lanes a) { return least_lane(a, (int)0x80000000); }
template <class Lanes>
inline int farthest(Lanes a) { return least_lane(a, -1); }

inline void widen_f16_pair(Halves h, Vec &a, Vec &b) {
    a = {_mm256_cvtph_ps(_mm256_castsi256_si128(h.v))};
    b = {_mm256_cvtph_ps(_mm256_extracti128_si256(h.v, 1))};
}

// Two bf16 vectors without bringing the lanes together: packing them again leaves them in order.
inline void widen_bf16_apart(Halves pair, Vec &a, Vec &b) { part_bf16_pair(pair.v, a, b); }

// Of each the upper half and `weight` times the lower one, in an order of their own until they are stored. All of 15 bits.
inline Halves join_halves(Ints a, Ints b, int weight) {
    const __m256i by = _mm256_set1_epi32(1 << 16 | weight);
    return {_mm256_packus_epi32(_mm256_madd_epi16(a.v, by), _mm256_madd_epi16(b.v, by))};
}
// The signs in the same order.
inline Halves sign_halves(Ints a, Ints b) { return {_mm256_packs_epi32(a.v, b.v)}; }

// [Note: split pairs]
// Putting neighbours from two vectors together as 16 bits is cheapest where one holds the elements of even places and
// the other those of odd places: no lane is crossed. Who makes both vectors himself asks for them so.
// Codes come as whole numbers times 2^kSplit, or 2^kSplitSigned where their top bit is a sign: one shuffle each.
enum { kSplit = 16, kSplitSigned = 24 };
inline void split_bytes(const uint8_t *p, Ints &a, Ints &b) {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    const __m256i even = _mm256_setr_epi8(-1, -1, 0, -1, -1, -1, 2, -1, -1, -1, 4, -1, -1, -1, 6, -1,
                                          -1, -1, 8, -1, -1, -1, 10, -1, -1, -1, 12, -1, -1, -1, 14, -1);
    const __m256i odd = _mm256_setr_epi8(-1, -1, 1, -1, -1, -1, 3, -1, -1, -1, 5, -1, -1, -1, 7, -1,
                                         -1, -1, 9, -1, -1, -1, 11, -1, -1, -1, 13, -1, -1, -1, 15, -1);
    a = {_mm256_shuffle_epi8(all, even)};
    b = {_mm256_shuffle_epi8(all, odd)};
}
inline void split_signed_bytes(const uint8_t *p, Ints &a, Ints &b) {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    const __m256i even = _mm256_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 2, -1, -1, -1, 4, -1, -1, -1, 6,
                                          -1, -1, -1, 8, -1, -1, -1, 10, -1, -1, -1, 12, -1, -1, -1, 14);
    const __m256i odd = _mm256_setr_epi8(-1, -1, -1, 1, -1, -1, -1, 3, -1, -1, -1, 5, -1, -1, -1, 7,
                                         -1, -1, -1, 9, -1, -1, -1, 11, -1, -1, -1, 13, -1, -1, -1, 15);
    a = {_mm256_shuffle_epi8(all, even)};
    b = {_mm256_shuffle_epi8(all, odd)};
}
inline void widen_bf16_split(Halves pair, Vec &a, Vec &b) {
    a = {_mm256_castsi256_ps(_mm256_slli_epi32(pair.v, 16))};
    b = {_mm256_castsi256_ps(_mm256_and_si256(pair.v, _mm256_set1_epi32((int)0xffff0000)))};
}
// Where an element's float stands in such pairs, one behind the other.
inline int split_place(int i) { return (i & ~15) + (i & 15) / 2 + (i & 1) * 8; }

// [Note: roots of bf16 numbers]
// An estimate with an error of up to 1.5 * 2^-12 (as the processors' makers state) is corrected twice by the remainder of
// its square: the error is below 2^-33.2 of the root before that is rounded. The roots of the 256 pairs of a mantissa of
// bf16 and an odd or even exponent are 2^-32.7 of themselves or more from where two floats are equally near: so it is
// the rounded root. Remainders have to be normal numbers; false where a number is too small for that, or not finite.
inline bool roots_of_bf16(Vec &a, Vec &b) {
    const __m256i first = _mm256_set1_epi32((int)(0x10000000u - 0x80000000u));
    const __m256i most = _mm256_max_epi32(_mm256_sub_epi32(_mm256_castps_si256(a.v), first),
                                          _mm256_sub_epi32(_mm256_castps_si256(b.v), first));
    const __m256i last = _mm256_set1_epi32(0x7f7fffff - 0x10000000 + (int)0x80000000);
    if (_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(most, last)))) return false;
    const auto root_of = [](Vec &x) {
        const __m256 y = _mm256_rsqrt_ps(x.v), half = _mm256_mul_ps(y, _mm256_set1_ps(0.5f));
        __m256 r = _mm256_mul_ps(x.v, y);
        r = _mm256_fmadd_ps(_mm256_fnmadd_ps(r, r, x.v), half, r);
        x = {_mm256_fmadd_ps(_mm256_fnmadd_ps(r, r, x.v), half, r)};
    };
    root_of(a);
    root_of(b);
    return true;
}

// A split pair without NaN to bf16: more where the lower halves reach 0x8000, or 0x8001 if the upper one is even.
inline Halves narrow_bf16_split(Vec a, Vec b) {
    const __m256i x = _mm256_castps_si256(a.v), y = _mm256_castps_si256(b.v);
    const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(x, 16), y, 0xaa);
    const __m256i low = _mm256_blend_epi16(x, _mm256_slli_epi32(y, 16), 0xaa);
    const __m256i least = _mm256_sub_epi16(_mm256_set1_epi16((short)0x8001),
                                           _mm256_and_si256(high, _mm256_set1_epi16(1)));
    return {_mm256_sub_epi16(high, _mm256_cmpeq_epi16(_mm256_max_epu16(low, least), low))};
}

// Four vectors of integers as bytes, in an order of their own until they are stored.
struct Bytes {
    enum { width = 4 * Vec::width };
    __m256i v;

    static Bytes all(int x) { return {_mm256_set1_epi8((char)x)}; }
    // For ByteTable.
    static Bytes load_apart(const uint8_t *p) {
        return {_mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)p), 0xd8)};
    }
    void store(uint8_t *p) const {
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32(v, order));
    }
    // Of vectors that were widened apart.
    void store_apart(uint8_t *p) const {
        _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(v, 0xd8));
    }
};

inline Bytes operator-(Bytes a, Bytes b) { return {_mm256_sub_epi8(a.v, b.v)}; }
inline Bytes smaller(Bytes a, Bytes b) { return {_mm256_min_epu8(a.v, b.v)}; }
inline Bytes operator&(Bytes a, Bytes b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }
// Bits of the neighbours move in.
inline Bytes right(Bytes a, int n) { return {_mm256_srl_epi16(a.v, _mm_cvtsi32_si128(n))}; }

// Those of 0 to 255; and the sign of each in the top bit of its byte, whose other bits mean nothing.
inline Bytes to_bytes(Halves a, Halves b) { return {_mm256_packus_epi16(a.v, b.v)}; }
inline Bytes sign_bytes(Halves a, Halves b) { return {_mm256_packs_epi16(a.v, b.v)}; }

// [Note: codes by saturation]
// Floats to the nearest whole numbers from `least` to `most`, then + bias. What is too small, NaN too, ends as 0 and what
// is too large as 255 when it is packed without a sign, counted from `least`. Beyond 2^31 a conversion would lose the
// sign: groups whose scale could lead there do not come here.
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
        const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(a.v), _mm256_cvtps_epi32(b.v));
        const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(c.v), _mm256_cvtps_epi32(d.v));
        if (signed_bytes) return {_mm256_packs_epi16(low, high)};
        const __m256i all =
            _mm256_packus_epi16(_mm256_adds_epi16(low, from.v), _mm256_adds_epi16(high, from.v));
        const __m256i code = _mm256_sub_epi8(_mm256_min_epu8(all, last.v), back.v);
        return {_mm256_and_si256(code, mask.v)};
    }
};

// kFours codes of four bits, one a byte, into half as many bytes.
enum { kFours = 64 };
inline void join_fours(const uint8_t *codes, uint8_t *out, bool high_first) {
    const __m256i factors = _mm256_set1_epi16(high_first ? 0x0110 : 0x1001);
    const __m256i *in = (const __m256i *)codes;
    const __m256i low = _mm256_maddubs_epi16(_mm256_loadu_si256(in), factors);
    const __m256i high = _mm256_maddubs_epi16(_mm256_loadu_si256(in + 1), factors);
    _mm256_storeu_si256((__m256i *)out,
                        _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8));
}

// The low three bytes of each 32 bits, without gaps, and back: there each 32 bits get as their halves the first and the
// last two of three bytes.
inline void store_threes(__m256i a, uint8_t *out) {
    const __m256i low = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,
                                         0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m256i order = _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7);
    const __m256i all = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(a, low), order);
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(all));
    _mm_storel_epi64((__m128i *)(out + 16), _mm256_extracti128_si256(all, 1));
}
inline __m256i load_threes(const uint8_t *in) {
    const __m256i both = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)in)),
        _mm_loadu_si128((const __m128i *)(in + 8)), 1);
    const __m256i pick = _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11,
                                          4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12, 13, 14, 14, 15);
    return _mm256_shuffle_epi8(both, pick);
}
// Of two codes of 12 bits in three bytes.
inline __m256i part_twelves(const uint8_t *in) {
    const __m256i two = load_threes(in);
    return _mm256_blend_epi16(_mm256_and_si256(two, _mm256_set1_epi32(0xfff)),
                              _mm256_srli_epi16(two, 4), 0xaa);
}

// kSixes codes of six bits, one in the upper bits of a byte when they come back, in three quarters as many bytes; kTwelves codes of 12 bits, one a word.
enum { kSixes = 32, kTwelves = 16 };
inline void join_sixes(const uint8_t *codes, uint8_t *out) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i *)codes),
                                               _mm256_set1_epi16(0x4001));
    store_threes(_mm256_madd_epi16(pairs, _mm256_set1_epi32(0x10000001)), out);
}
inline void part_sixes(const uint8_t *in, uint8_t *codes) {
    const __m256i two = part_twelves(in);
    const __m256i low = _mm256_and_si256(_mm256_slli_epi16(two, 2), _mm256_set1_epi16(0xfc));
    const __m256i high =
        _mm256_and_si256(_mm256_slli_epi16(two, 4), _mm256_set1_epi16((short)0xfc00));
    _mm256_storeu_si256((__m256i *)codes, _mm256_or_si256(low, high));
}
inline void join_twelves(const uint16_t *codes, uint8_t *out) {
    const __m256i two = _mm256_loadu_si256((const __m256i *)codes);
    store_threes(_mm256_madd_epi16(two, _mm256_set1_epi32(0x10000001)), out);
}
inline void part_twelves(const uint8_t *in, uint16_t *codes) {
    _mm256_storeu_si256((__m256i *)codes, part_twelves(in));
}

// Sixteen 16-bit values, looked up by bytes below 16. Low and high bytes are looked up apart.
struct ByteTable {
    __m256i low, high;

    explicit ByteTable(const uint16_t *sixteen) {
        const __m128i *in = (const __m128i *)sixteen;
        const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
        const __m128i whole = _mm_set1_epi16(0xff);
        low = _mm256_broadcastsi128_si256(
            _mm_packus_epi16(_mm_and_si128(a, whole), _mm_and_si128(b, whole)));
        high = _mm256_broadcastsi128_si256(
            _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
    }
    // Values, with `more` set in their upper bytes; in order if the bytes were loaded apart.
    void look_up(Bytes at, Bytes more, Halves &a, Halves &b) const {
        join(_mm256_shuffle_epi8(low, at.v), _mm256_or_si256(_mm256_shuffle_epi8(high, at.v), more.v),
             a, b);
    }
    // The bytes as upper ones.
    static void raise(Bytes upper, Halves &a, Halves &b) {
        join(_mm256_setzero_si256(), upper.v, a, b);
    }
    static void join(__m256i lower, __m256i upper, Halves &a, Halves &b) {
        a = {_mm256_unpacklo_epi8(lower, upper)};
        b = {_mm256_unpackhi_epi8(lower, upper)};
    }
};

// What packed codes of four bits stand for.
struct HalfTable {
    enum { codes = 32 };
    ByteTable values;

    explicit HalfTable(const uint16_t *sixteen) : values(sixteen) {}
    void spread(const uint8_t *packed, bool high_first, uint16_t *to) const {
        // The four-byte parts lie so that unpacking within lanes leaves all in order.
        const __m128i in = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)packed), 0xd8);
        const __m256i wide = _mm256_cvtepu8_epi16(in);
        const __m256i pairs = high_first ? _mm256_or_si256(_mm256_srli_epi16(wide, 4),
                                                           _mm256_slli_epi16(wide, 8))
                                         : _mm256_or_si256(wide, _mm256_slli_epi16(wide, 4));
        Halves a, b;
        values.look_up({_mm256_and_si256(pairs, _mm256_set1_epi8(15))}, Bytes::all(0), a, b);
        a.store_apart(to);
        b.store_apart(to + 16);
    }
};

// 64 bytes past the caches; both addresses are multiples of 64.
inline void stream_line(const char *from, char *to) {
    const __m256i *in = (const __m256i *)from;
    const __m256i a = _mm256_load_si256(in), b = _mm256_load_si256(in + 1);
    _mm256_stream_si256((__m256i *)to, a);
    _mm256_stream_si256((__m256i *)to + 1, b);
}
inline void settle_streams() { _mm_sfence(); }

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

// Squares of floats are exact as doubles: it does not matter that they are fused with the sum.
struct Squares {
    __m256d lane[8];

    static Squares zero() {
        const __m256d none = _mm256_setzero_pd();
        return {{none, none, none, none, none, none, none, none}};
    }
    void add(const float *p) {
        for (int i = 0; i < 8; ++i) {
            const __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(p + 4 * i));
            lane[i] = _mm256_fmadd_pd(x, x, lane[i]);
        }
    }
    void store(double *out) const {
        for (int i = 0; i < 8; ++i) _mm256_storeu_pd(out + 4 * i, lane[i]);
    }
};

}  // namespace
