// SPDX-License-Identifier: Apache-2.0
// Vec of 4 floats: 64-bit Arm, where NEON is always there. No fused multiply-add, see vec_avx2.h.
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
inline Ints left(Ints a, int n) { return {vshlq_u32(a.v, vdupq_n_s32(n))}; }
inline Ints right(Ints a, int n) { return {vshlq_u32(a.v, vdupq_n_s32(-n))}; }
inline Ints right_each(Ints a, Ints n) {
    return {vshlq_u32(a.v, vnegq_s32(vreinterpretq_s32_u32(n.v)))};
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

// The largest lane of a vector without NaN.
inline float highest(Vec a) { return vmaxvq_f32(a.v); }

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
            lane[i] = vaddq_f64(lane[i], vmulq_f64(x, x));
        }
    }
    void store(double *out) const {
        for (int i = 0; i < 16; ++i) vst1q_f64(out + 2 * i, lane[i]);
    }
};

}  // namespace
