// SPDX-License-Identifier: Apache-2.0
// Vec of width 1: plain C++. The reading version of every kernel, and the path of any CPU.
#pragma once

#include <stdint.h>

#if defined(_MSC_VER) && !defined(__clang__)
extern "C" float sqrtf(float);
#define DS_SQRTF sqrtf
#else
#define DS_SQRTF __builtin_sqrtf
#endif

namespace {

struct Vec {
    enum { width = 1 };
    float v;

    static Vec all(float x) { return {x}; }
    static Vec load(const float *p) { return {*p}; }
    void store(float *p) const { *p = v; }
};

inline void prefetch(const void *) {}

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec root(Vec a) { return {DS_SQRTF(a.v)}; }
// -1, 0 or 1; 0 for NaN, as torch.sign.
inline Vec sign(Vec a) { return {(float)((a.v > 0) - (a.v < 0))}; }

union FloatBits {
    float f;
    uint32_t u;
};

inline float bf16_to_float(uint16_t h) {
    FloatBits x;
    x.u = (uint32_t)h << 16;
    return x.f;
}

inline uint16_t float_to_bf16(float f) {
    FloatBits x;
    x.f = f;
    if (f != f) return (uint16_t)(x.u >> 16 | 0x40);  // keep the sign, make it quiet
    return (uint16_t)((x.u + 0x7fff + (x.u >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t h) {
    FloatBits x, magic;
    x.u = (uint32_t)(h & 0x7fff) << 13;
    const uint32_t exponent = x.u & 0x0f800000;
    if (exponent == 0x0f800000) {
        x.u += (uint32_t)(255 - 31) << 23;  // inf and NaN
        if (h & 0x3ff) x.u |= 0x00400000;
    } else if (exponent != 0) {
        x.u += (uint32_t)(127 - 15) << 23;
    } else {
        // Subnormal: let one exact subtraction find the exponent.
        x.u += (uint32_t)(127 - 14) << 23;
        magic.u = (uint32_t)(127 - 14) << 23;
        x.f -= magic.f;
    }
    x.u |= (uint32_t)(h & 0x8000) << 16;
    return x.f;
}

inline uint16_t float_to_f16(float f) {
    FloatBits x, magic;
    x.f = f;
    const uint32_t negative = x.u >> 16 & 0x8000;
    x.u &= 0x7fffffff;
    if (x.u > 0x7f800000) return (uint16_t)(negative | 0x7e00 | (x.u >> 13 & 0x3ff));
    if (x.u >= 0x47800000) return (uint16_t)(negative | 0x7c00);  // 65536 and more
    if (x.u < 0x38800000) {
        // Subnormal: adding 0.5 leaves the rounded mantissa in the low bits.
        magic.u = (uint32_t)126 << 23;
        x.f += magic.f;
        return (uint16_t)(negative | (x.u - magic.u));
    }
    x.u += ((uint32_t)(15 - 127) << 23) + 0xfff + (x.u >> 13 & 1);
    return (uint16_t)(negative | x.u >> 13);
}

inline Vec widen_bf16(const uint16_t *p) { return {bf16_to_float(*p)}; }
inline Vec widen_f16(const uint16_t *p) { return {f16_to_float(*p)}; }
inline void narrow_bf16(Vec a, uint16_t *p) { *p = float_to_bf16(a.v); }
inline void narrow_f16(Vec a, uint16_t *p) { *p = float_to_f16(a.v); }

// Two vectors of results of arithmetic: a NaN among them is quiet, which some paths make use of.
inline void narrow_bf16_pair(Vec a, Vec b, uint16_t *p) {
    p[0] = float_to_bf16(a.v);
    p[1] = float_to_bf16(b.v);
}

inline void widen_bf16_pair(const uint16_t *p, Vec &a, Vec &b) {
    a = widen_bf16(p);
    b = widen_bf16(p + Vec::width);
}

// As many 32-bit integers; arithmetic wraps, shifts are logical.
struct Ints {
    int32_t v;

    static Ints all(int32_t x) { return {x}; }
    static Ints load(const uint32_t *p) { return {(int32_t)*p}; }
    static Ints bytes(const uint8_t *p) { return {*p}; }
    static Ints words(const uint16_t *p) { return {*p}; }
    void store_bytes(uint8_t *p) const { *p = (uint8_t)v; }
    void store_words(uint16_t *p) const { *p = (uint16_t)v; }
};

struct Mask {
    bool v;
};

inline Ints operator+(Ints a, Ints b) { return {(int32_t)((uint32_t)a.v + (uint32_t)b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {(int32_t)((uint32_t)a.v - (uint32_t)b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {a.v & b.v}; }
inline Ints operator|(Ints a, Ints b) { return {a.v | b.v}; }
inline Ints left(Ints a, int n) { return {(int32_t)((uint32_t)a.v << n)}; }
inline Ints right(Ints a, int n) { return {(int32_t)((uint32_t)a.v >> n)}; }
inline Ints right_each(Ints a, Ints n) { return {(int32_t)((uint32_t)a.v >> n.v)}; }  // n < 32

inline Ints bits(Vec a) {
    FloatBits x;
    x.f = a.v;
    return {(int32_t)x.u};
}
inline Vec floats(Ints a) {
    FloatBits x;
    x.u = (uint32_t)a.v;
    return {x.f};
}
inline Vec to_float(Ints a) { return {(float)a.v}; }

// The second where one is NaN.
inline Vec larger(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec smaller(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Mask less(Vec a, Vec b) { return {a.v < b.v}; }
inline Mask less(Ints a, Ints b) { return {a.v < b.v}; }
inline Mask unordered(Vec a) { return {a.v != a.v}; }
inline Mask operator|(Mask a, Mask b) { return {a.v || b.v}; }
inline bool any(Mask a) { return a.v; }
inline Vec select(Mask m, Vec a, Vec b) { return m.v ? a : b; }
inline Ints select(Mask m, Ints a, Ints b) { return m.v ? a : b; }

// The largest lane of a vector without NaN.
inline float highest(Vec a) { return a.v; }

// The values of codes 0 to 15.
struct Table {
    const float *values;

    explicit Table(const float *sixteen) : values(sixteen) {}
    Vec operator[](Ints codes) const { return {values[codes.v & 15]}; }
};

// Sums of squares in kNormLanes doubles; `add` takes kNormLanes elements.
struct Squares {
    double lane[32];

    static Squares zero() {
        Squares s;
        for (int i = 0; i < 32; ++i) s.lane[i] = 0;
        return s;
    }
    void add(const float *p) {
        for (int i = 0; i < 32; ++i) lane[i] += (double)p[i] * p[i];
    }
    void store(double *out) const {
        for (int i = 0; i < 32; ++i) out[i] = lane[i];
    }
};

}  // namespace
