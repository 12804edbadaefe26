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
