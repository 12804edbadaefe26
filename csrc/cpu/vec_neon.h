// SPDX-License-Identifier: Apache-2.0
// Vec of 4 floats: 64-bit Arm, where NEON is always there. Sums are fused with products as seldom as in vec_avx2.h.
#pragma once

#include <arm_neon.h>
#include <stdint.h>

namespace {

struct Vec {
    enum { width = 4 };
    float32x4_t v;

    static Vec all(float x) { return {vdupq_n_f32(x)}; }
    static Vec load(const float *p) { return {vld1q_f32(p)}; }
    void store(float *p) const { vst1q_f32(p, v); }
};

#if defined(_MSC_VER) && !defined(__clang__)
inline void prefetch(const void *p) { __prefetch(p); }
#else
inline void prefetch(const void *p) { __builtin_prefetch(p); }
#endif

inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec root(Vec a) { return {vsqrtq_f32(a.v)}; }
// a * b + c where the product is exact.
inline Vec exact_sum(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }

// See [Note: quotients without division] in vec_avx2.h.
struct Divisor {
    Vec by, inverse, rest;

    explicit Divisor(Vec x) : by(x), inverse(Vec::all(1) / x) {
        rest = {vmulq_f32(vfmsq_f32(vdupq_n_f32(1), inverse.v, by.v), inverse.v)};
    }
    Vec close(Vec x) const { return {vfmaq_f32(vmulq_f32(x.v, rest.v), x.v, inverse.v)}; }
    Vec exact(Vec x) const {
        const Vec q = close(x);
        return {vfmaq_f32(q.v, vfmsq_f32(x.v, q.v, by.v), inverse.v)};
    }
};

inline Vec sign(Vec a) {
    const uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1));
    const float32x4_t up = vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(a.v), one));
    const float32x4_t down = vreinterpretq_f32_u32(vandq_u32(vcltzq_f32(a.v), one));
    return {vsubq_f32(up, down)};
}

inline Vec widen_bf16(const uint16_t *p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
}

inline Vec widen_f16(const uint16_t *p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))};
}

inline void narrow_bf16(Vec a, uint16_t *p) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(a.v, a.v), rounded, quiet), 16));
}

inline void narrow_f16(Vec a, uint16_t *p) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}

// Two vectors of results of arithmetic.
inline void narrow_bf16_pair(Vec a, Vec b, uint16_t *p) {
    narrow_bf16(a, p);
    narrow_bf16(b, p + 4);
}

inline void widen_bf16_pair(const uint16_t *p, Vec &a, Vec &b) {
    a = widen_bf16(p);
    b = widen_bf16(p + Vec::width);
}

// Leaves in a and b what was stored.
inline void keep_bf16_pair(Vec &a, Vec &b, uint16_t *p) {
    narrow_bf16_pair(a, b, p);
    widen_bf16_pair(p, a, b);
}

// As many 32-bit integers; arithmetic wraps, shifts are logical.
struct Ints {
    uint32x4_t v;

    static Ints all(int32_t x) { return {vdupq_n_u32((uint32_t)x)}; }
    static Ints load(const uint32_t *p) { return {vld1q_u32(p)}; }
    static Ints bytes(const uint8_t *p) {
        const uint32_t four = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        const uint8x8_t narrow = vreinterpret_u8_u32(vdup_n_u32(four));
        return {vmovl_u16(vget_low_u16(vmovl_u8(narrow)))};
    }
    static Ints signed_bytes(const uint8_t *p) {
        const uint32x4_t high = vshlq_n_u32(bytes(p).v, 24);
        return {vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(high), 24))};
    }
    static Ints words(const uint16_t *p) { return {vmovl_u16(vld1_u16(p))}; }
    void store_bytes(uint8_t *p) const {
        const uint16x4_t half = vmovn_u32(v);
        const uint8x8_t narrow = vmovn_u16(vcombine_u16(half, half));
        const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(narrow), 0);
        for (int i = 0; i < 4; ++i) p[i] = (uint8_t)(four >> (8 * i));
    }
    void store_words(uint16_t *p) const { vst1_u16(p, vmovn_u32(v)); }
};

struct Mask {
    uint32x4_t v;
};

inline Ints operator+(Ints a, Ints b) { return {vaddq_u32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {vsubq_u32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {vandq_u32(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {vorrq_u32(a.v, b.v)}; }
inline Ints operator^(Ints a, Ints b) { return {veorq_u32(a.v, b.v)}; }
inline Ints left(Ints a, int n) { return {vshlq_u32(a.v, vdupq_n_s32(n))}; }
inline Ints right(Ints a, int n) { return {vshlq_u32(a.v, vdupq_n_s32(-n))}; }
inline Ints right_each(Ints a, Ints n) {
    return {vshlq_u32(a.v, vnegq_s32(vreinterpretq_s32_u32(n.v)))};
}
inline Ints larger(Ints a, Ints b) {
    return {vreinterpretq_u32_s32(
        vmaxq_s32(vreinterpretq_s32_u32(a.v), vreinterpretq_s32_u32(b.v)))};
}
inline Ints smaller(Ints a, Ints b) {
    return {vreinterpretq_u32_s32(
        vminq_s32(vreinterpretq_s32_u32(a.v), vreinterpretq_s32_u32(b.v)))};
}
inline Ints bits(Vec a) { return {vreinterpretq_u32_f32(a.v)}; }
inline Vec floats(Ints a) { return {vreinterpretq_f32_u32(a.v)}; }
inline Vec to_float(Ints a) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.v))}; }

// The second where one is NaN.
inline Vec larger(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Mask less(Vec a, Vec b) { return {vcltq_f32(a.v, b.v)}; }
inline Mask less(Ints a, Ints b) {
    return {vcltq_s32(vreinterpretq_s32_u32(a.v), vreinterpretq_s32_u32(b.v))};
}
inline Mask unordered(Vec a) { return {vmvnq_u32(vceqq_f32(a.v, a.v))}; }
inline Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.v, b.v)}; }
inline bool any(Mask a) { return vmaxvq_u32(a.v) != 0; }
inline Vec select(Mask m, Vec a, Vec b) { return {vbslq_f32(m.v, a.v, b.v)}; }
inline Ints select(Mask m, Ints a, Ints b) { return {vbslq_u32(m.v, a.v, b.v)}; }

// The greater as numbers without a sign; and the lane that is each of the three.
inline Ints farther(Ints a, Ints b) { return {vmaxq_u32(a.v, b.v)}; }
inline int highest(Ints a) { return vmaxvq_s32(vreinterpretq_s32_u32(a.v)); }
inline int lowest(Ints a) { return vminvq_s32(vreinterpretq_s32_u32(a.v)); }
inline int farthest(Ints a) { return (int)vmaxvq_u32(a.v); }

// Twice as many 16-bit integers, with a sign where it matters.
struct Halves {
    enum { width = 2 * Vec::width };
    int16x8_t v;

    static Halves all(int x) { return {vdupq_n_s16((int16_t)x)}; }
    static Halves load(const uint16_t *p) { return {vreinterpretq_s16_u16(vld1q_u16(p))}; }
    static Halves bytes(const uint8_t *p) {
        return {vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p)))};
    }
    void store(uint16_t *p) const { vst1q_u16(p, vreinterpretq_u16_s16(v)); }
    void store_apart(uint16_t *p) const { store(p); }
};

inline Halves operator+(Halves a, Halves b) { return {vaddq_s16(a.v, b.v)}; }
inline Halves operator-(Halves a, Halves b) { return {vsubq_s16(a.v, b.v)}; }
inline Halves operator&(Halves a, Halves b) { return {vandq_s16(a.v, b.v)}; }
inline Halves operator|(Halves a, Halves b) { return {vorrq_s16(a.v, b.v)}; }
inline Halves left(Halves a, int n) { return {vshlq_s16(a.v, vdupq_n_s16((int16_t)n))}; }
// The sign moves in.
inline Halves right(Halves a, int n) { return {vshlq_s16(a.v, vdupq_n_s16((int16_t)-n))}; }
inline Halves larger(Halves a, Halves b) { return {vmaxq_s16(a.v, b.v)}; }
inline Halves farther(Halves a, Halves b) {
    return {vreinterpretq_s16_u16(
        vmaxq_u16(vreinterpretq_u16_s16(a.v), vreinterpretq_u16_s16(b.v)))};
}
inline Halves smaller(Halves a, Halves b) { return {vminq_s16(a.v, b.v)}; }
inline int highest(Halves a) { return vmaxvq_s16(a.v); }
inline int lowest(Halves a) { return vminvq_s16(a.v); }
inline int farthest(Halves a) { return (int16_t)vmaxvq_u16(vreinterpretq_u16_s16(a.v)); }

inline void widen_f16_pair(Halves h, Vec &a, Vec &b) {
    a = {vcvt_f32_f16(vreinterpret_f16_s16(vget_low_s16(h.v)))};
    b = {vcvt_f32_f16(vreinterpret_f16_s16(vget_high_s16(h.v)))};
}

// The same as in vec_avx2.h, all in order.
inline void widen_bf16_apart(Halves pair, Vec &a, Vec &b) {
    const uint16x8_t both = vreinterpretq_u16_s16(pair.v);
    a = {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(both), 16))};
    b = {vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(both), 16))};
}
inline Halves upper_halves(Ints a, Ints b) {
    return {vreinterpretq_s16_u16(vcombine_u16(vshrn_n_u32(a.v, 16), vshrn_n_u32(b.v, 16)))};
}
inline Halves join_halves(Ints a, Ints b, int weight) {
    const uint16x8_t low = vcombine_u16(vmovn_u32(a.v), vmovn_u32(b.v));
    return {vmlaq_n_s16(upper_halves(a, b).v, vreinterpretq_s16_u16(low), (int16_t)weight)};
}
inline Halves sign_halves(Ints a, Ints b) { return upper_halves(a, b); }

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
inline void widen_bf16_split(Halves pair, Vec &a, Vec &b) { widen_bf16_apart(pair, a, b); }
inline int split_place(int i) { return i; }
inline bool roots_of_bf16(Vec &, Vec &) { return false; }
// A pair without NaN to bf16.
inline Halves narrow_bf16_split(Vec a, Vec b) {
    uint16_t two[2 * Vec::width];
    narrow_bf16_pair(a, b, two);
    return Halves::load(two);
}

// Four vectors of integers as bytes.
struct Bytes {
    enum { width = 4 * Vec::width };
    uint8x16_t v;

    static Bytes all(int x) { return {vdupq_n_u8((uint8_t)x)}; }
    static Bytes load_apart(const uint8_t *p) { return {vld1q_u8(p)}; }
    void store(uint8_t *p) const { vst1q_u8(p, v); }
    void store_apart(uint8_t *p) const { store(p); }
};

inline Bytes operator-(Bytes a, Bytes b) { return {vsubq_u8(a.v, b.v)}; }
inline Bytes smaller(Bytes a, Bytes b) { return {vminq_u8(a.v, b.v)}; }
inline Bytes operator&(Bytes a, Bytes b) { return {vandq_u8(a.v, b.v)}; }
inline Bytes operator|(Bytes a, Bytes b) { return {vorrq_u8(a.v, b.v)}; }
// Elsewhere bits of the neighbours move in.
inline Bytes right(Bytes a, int n) { return {vshlq_u8(a.v, vdupq_n_s8((int8_t)-n))}; }

inline Bytes to_bytes(Halves a, Halves b) {
    return {vcombine_u8(vmovn_u16(vreinterpretq_u16_s16(a.v)),
                        vmovn_u16(vreinterpretq_u16_s16(b.v)))};
}
inline Bytes sign_bytes(Halves a, Halves b) {
    return {vcombine_u8(vshrn_n_u16(vreinterpretq_u16_s16(a.v), 8),
                        vshrn_n_u16(vreinterpretq_u16_s16(b.v), 8))};
}

// Floats to the nearest whole numbers from `least` to `most`, which get `bias` and keep the bits of `mask`. NaN becomes
// the least.
struct Whole {
    Vec least, most;
    int16x8_t bias, mask;

    Whole(float least_, float most_, int bias_, int mask_)
        : least(Vec::all(least_)),
          most(Vec::all(most_)),
          bias(vdupq_n_s16((int16_t)bias_)),
          mask(vdupq_n_s16((int16_t)mask_)) {}

    uint8x8_t codes(Vec a, Vec b) const {
        const int32x4_t x = vcvtnq_s32_f32(smaller(larger(a, least), most).v);
        const int32x4_t y = vcvtnq_s32_f32(smaller(larger(b, least), most).v);
        const int16x8_t both = vcombine_s16(vmovn_s32(x), vmovn_s32(y));
        return vmovn_u16(vreinterpretq_u16_s16(vandq_s16(vaddq_s16(both, bias), mask)));
    }
    Bytes operator()(Vec a, Vec b, Vec c, Vec d) const {
        return {vcombine_u8(codes(a, b), codes(c, d))};
    }
};

// kFours codes of four bits, one a byte, into half as many bytes.
enum { kFours = 32 };
inline void join_fours(const uint8_t *codes, uint8_t *out, bool high_first) {
    const uint8x16x2_t two = vld2q_u8(codes);
    const uint8x16_t high = high_first ? two.val[0] : two.val[1];
    vst1q_u8(out, vorrq_u8(vshlq_n_u8(high, 4), high_first ? two.val[1] : two.val[0]));
}

// Codes of six and of twelve bits, see vec_avx2.h.
enum { kSixes = 64, kTwelves = 16 };
inline void join_sixes(const uint8_t *codes, uint8_t *out) {
    const uint8x16x4_t c = vld4q_u8(codes);
    uint8x16x3_t three;
    three.val[0] = vorrq_u8(c.val[0], vshlq_n_u8(c.val[1], 6));
    three.val[1] = vorrq_u8(vshrq_n_u8(c.val[1], 2), vshlq_n_u8(c.val[2], 4));
    three.val[2] = vorrq_u8(vshrq_n_u8(c.val[2], 4), vshlq_n_u8(c.val[3], 2));
    vst3q_u8(out, three);
}
inline void part_sixes(const uint8_t *in, uint8_t *codes) {
    const uint8x16x3_t three = vld3q_u8(in);
    const uint8x16_t mask = vdupq_n_u8(0xfc);
    uint8x16x4_t c;
    c.val[0] = vshlq_n_u8(three.val[0], 2);
    c.val[1] = vandq_u8(vsriq_n_u8(vshlq_n_u8(three.val[1], 4), three.val[0], 4), mask);
    c.val[2] = vandq_u8(vsriq_n_u8(vshlq_n_u8(three.val[2], 6), three.val[1], 2), mask);
    c.val[3] = vandq_u8(three.val[2], mask);
    vst4q_u8(codes, c);
}
inline void join_twelves(const uint16_t *codes, uint8_t *out) {
    const uint16x8x2_t two = vld2q_u16(codes);
    const uint16x8_t a = two.val[0], b = two.val[1];
    uint8x8x3_t three;
    three.val[0] = vmovn_u16(a);
    three.val[1] = vorr_u8(vshrn_n_u16(a, 8), vshl_n_u8(vmovn_u16(b), 4));
    three.val[2] = vshrn_n_u16(b, 4);
    vst3_u8(out, three);
}
inline void part_twelves(const uint8_t *in, uint16_t *codes) {
    const uint8x8x3_t three = vld3_u8(in);
    const uint16x8_t middle = vmovl_u8(three.val[1]);
    uint16x8x2_t two;
    two.val[0] = vorrq_u16(vmovl_u8(three.val[0]), vshlq_n_u16(vandq_u16(middle, vdupq_n_u16(15)), 8));
    two.val[1] = vorrq_u16(vshrq_n_u16(middle, 4), vshll_n_u8(three.val[2], 4));
    vst2q_u16(codes, two);
}

// See vec_avx2.h.
struct ByteTable {
    uint8x16_t low, high;

    explicit ByteTable(const uint16_t *sixteen) {
        const uint16x8_t a = vld1q_u16(sixteen), b = vld1q_u16(sixteen + 8);
        low = vcombine_u8(vmovn_u16(a), vmovn_u16(b));
        high = vcombine_u8(vshrn_n_u16(a, 8), vshrn_n_u16(b, 8));
    }
    void look_up(Bytes at, Bytes more, Halves &a, Halves &b) const {
        join(vqtbl1q_u8(low, at.v), vorrq_u8(vqtbl1q_u8(high, at.v), more.v), a, b);
    }
    static void raise(Bytes upper, Halves &a, Halves &b) { join(vdupq_n_u8(0), upper.v, a, b); }
    static void join(uint8x16_t lower, uint8x16_t upper, Halves &a, Halves &b) {
        a = {vreinterpretq_s16_u8(vzip1q_u8(lower, upper))};
        b = {vreinterpretq_s16_u8(vzip2q_u8(lower, upper))};
    }
};

// What packed codes of four bits stand for.
struct HalfTable {
    enum { codes = 32 };
    ByteTable values;

    explicit HalfTable(const uint16_t *sixteen) : values(sixteen) {}
    void spread(const uint8_t *packed, bool high_first, uint16_t *to) const {
        const uint8x16_t in = vld1q_u8(packed);
        const uint8x16_t bottom = vandq_u8(in, vdupq_n_u8(15)), top = vshrq_n_u8(in, 4);
        const uint8x16x2_t each = vzipq_u8(high_first ? top : bottom, high_first ? bottom : top);
        for (int i = 0; i < 2; ++i) {
            Halves a, b;
            values.look_up({each.val[i]}, Bytes::all(0), a, b);
            a.store(to + 16 * i);
            b.store(to + 16 * i + 8);
        }
    }
};

// 64 bytes; both addresses are multiples of 64.
inline void stream_line(const char *from, char *to) {
    for (int i = 0; i < 64; i += 16) vst1q_u8((uint8_t *)to + i, vld1q_u8((const uint8_t *)from + i));
}
inline void settle_streams() {}

// The values of codes 0 to 15.
struct Table {
    const float *values;

    explicit Table(const float *sixteen) : values(sixteen) {}
    Vec operator[](Ints codes) const {
        const uint32x4_t at = vandq_u32(codes.v, vdupq_n_u32(15));
        const float four[4] = {values[vgetq_lane_u32(at, 0)], values[vgetq_lane_u32(at, 1)],
                               values[vgetq_lane_u32(at, 2)], values[vgetq_lane_u32(at, 3)]};
        return {vld1q_f32(four)};
    }
};

struct Squares {
    float64x2_t lane[16];

    static Squares zero() {
        Squares s;
        for (int i = 0; i < 16; ++i) s.lane[i] = vdupq_n_f64(0);
        return s;
    }
    void add(const float *p) {
        for (int i = 0; i < 16; ++i) {
            const float64x2_t x = vcvt_f64_f32(vld1_f32(p + 2 * i));
            lane[i] = vfmaq_f64(lane[i], x, x);  // exact squares
        }
    }
    void store(double *out) const {
        for (int i = 0; i < 16; ++i) vst1q_f64(out + 2 * i, lane[i]);
    }
};

}  // namespace
