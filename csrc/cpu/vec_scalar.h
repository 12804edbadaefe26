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
// a * b + c where the product is exact.
inline Vec exact_sum(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// x / by; see vec_avx2.h.
struct Divisor {
    Vec by;

    explicit Divisor(Vec x) : by(x) {}
    Vec close(Vec x) const { return x / by; }
    Vec exact(Vec x) const { return close(x); }
};
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

// Leaves in a and b what was stored.
inline void keep_bf16_pair(Vec &a, Vec &b, uint16_t *p) {
    narrow_bf16_pair(a, b, p);
    widen_bf16_pair(p, a, b);
}

// As many 32-bit integers; arithmetic wraps, shifts are logical.
struct Ints {
    int32_t v;

    static Ints all(int32_t x) { return {x}; }
    static Ints load(const uint32_t *p) { return {(int32_t)*p}; }
    static Ints bytes(const uint8_t *p) { return {*p}; }
    static Ints signed_bytes(const uint8_t *p) { return {(int8_t)*p}; }
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
inline Ints operator^(Ints a, Ints b) { return {a.v ^ b.v}; }
inline Ints left(Ints a, int n) { return {(int32_t)((uint32_t)a.v << n)}; }
inline Ints right(Ints a, int n) { return {(int32_t)((uint32_t)a.v >> n)}; }
inline Ints right_each(Ints a, Ints n) { return {(int32_t)((uint32_t)a.v >> n.v)}; }  // n < 32

inline Ints larger(Ints a, Ints b) { return a.v > b.v ? a : b; }
inline Ints smaller(Ints a, Ints b) { return a.v < b.v ? a : b; }

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

// The greater as numbers without a sign; and the lane that is each of the three.
inline Ints farther(Ints a, Ints b) { return (uint32_t)a.v > (uint32_t)b.v ? a : b; }
inline int highest(Ints a) { return a.v; }
inline int lowest(Ints a) { return a.v; }
inline int farthest(Ints a) { return a.v; }

// Twice as many 16-bit integers, with a sign where it matters.
struct Halves {
    enum { width = 2 * Vec::width };
    int16_t v[2];

    static Halves of(int a, int b) { return {{(int16_t)a, (int16_t)b}}; }
    static Halves all(int x) { return of(x, x); }
    static Halves load(const uint16_t *p) { return of(p[0], p[1]); }
    static Halves bytes(const uint8_t *p) { return of(p[0], p[1]); }
    void store(uint16_t *p) const {
        p[0] = (uint16_t)v[0];
        p[1] = (uint16_t)v[1];
    }
    void store_apart(uint16_t *p) const { store(p); }
};

inline Halves operator+(Halves a, Halves b) { return Halves::of(a.v[0] + b.v[0], a.v[1] + b.v[1]); }
inline Halves operator-(Halves a, Halves b) { return Halves::of(a.v[0] - b.v[0], a.v[1] - b.v[1]); }
inline Halves operator&(Halves a, Halves b) { return Halves::of(a.v[0] & b.v[0], a.v[1] & b.v[1]); }
inline Halves operator|(Halves a, Halves b) { return Halves::of(a.v[0] | b.v[0], a.v[1] | b.v[1]); }
inline Halves left(Halves a, int n) {
    return Halves::of((uint16_t)a.v[0] << n, (uint16_t)a.v[1] << n);
}
// The sign moves in.
inline Halves right(Halves a, int n) { return Halves::of(a.v[0] >> n, a.v[1] >> n); }
inline int highest(Halves a) { return a.v[0] > a.v[1] ? a.v[0] : a.v[1]; }
inline int lowest(Halves a) { return a.v[0] < a.v[1] ? a.v[0] : a.v[1]; }
inline Halves larger(Halves a, Halves b) {
    return Halves::of(a.v[0] > b.v[0] ? a.v[0] : b.v[0], a.v[1] > b.v[1] ? a.v[1] : b.v[1]);
}
inline Halves smaller(Halves a, Halves b) {
    return Halves::of(a.v[0] < b.v[0] ? a.v[0] : b.v[0], a.v[1] < b.v[1] ? a.v[1] : b.v[1]);
}

inline Halves farther(Halves a, Halves b) {
    return Halves::of((uint16_t)a.v[0] > (uint16_t)b.v[0] ? a.v[0] : b.v[0],
                      (uint16_t)a.v[1] > (uint16_t)b.v[1] ? a.v[1] : b.v[1]);
}

inline int farthest(Halves a) {
    return (uint16_t)a.v[0] > (uint16_t)a.v[1] ? a.v[0] : a.v[1];
}

inline void widen_f16_pair(Halves h, Vec &a, Vec &b) {
    a = {f16_to_float((uint16_t)h.v[0])};
    b = {f16_to_float((uint16_t)h.v[1])};
}

// Two bf16 vectors, in an order of their own until they are stored.
inline void widen_bf16_apart(Halves pair, Vec &a, Vec &b) {
    a = {bf16_to_float((uint16_t)pair.v[0])};
    b = {bf16_to_float((uint16_t)pair.v[1])};
}
// Of each the upper half and `weight` times the lower one, in the same order; and the signs. All of 15 bits.
inline Halves join_halves(Ints a, Ints b, int weight) {
    return Halves::of((a.v >> 16) + weight * (a.v & 0xffff), (b.v >> 16) + weight * (b.v & 0xffff));
}
inline Halves sign_halves(Ints a, Ints b) { return Halves::of(a.v < 0 ? -1 : 0, b.v < 0 ? -1 : 0); }

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
    return Halves::of(float_to_bf16(a.v), float_to_bf16(b.v));
}

// Four vectors of integers as bytes.
struct Bytes {
    enum { width = 4 * Vec::width };
    uint8_t v[4];

    static Bytes of(int a, int b, int c, int d) {
        return {{(uint8_t)a, (uint8_t)b, (uint8_t)c, (uint8_t)d}};
    }
    static Bytes all(int x) { return of(x, x, x, x); }
    static Bytes load_apart(const uint8_t *p) { return of(p[0], p[1], p[2], p[3]); }
    void store(uint8_t *p) const {
        for (int i = 0; i < 4; ++i) p[i] = v[i];
    }
    void store_apart(uint8_t *p) const { store(p); }
};

inline Bytes operator-(Bytes a, Bytes b) {
    return Bytes::of(a.v[0] - b.v[0], a.v[1] - b.v[1], a.v[2] - b.v[2], a.v[3] - b.v[3]);
}
inline Bytes smaller(Bytes a, Bytes b) {
    for (int i = 0; i < 4; ++i)
        if (b.v[i] < a.v[i]) a.v[i] = b.v[i];
    return a;
}
inline Bytes operator&(Bytes a, Bytes b) {
    return Bytes::of(a.v[0] & b.v[0], a.v[1] & b.v[1], a.v[2] & b.v[2], a.v[3] & b.v[3]);
}
inline Bytes operator|(Bytes a, Bytes b) {
    return Bytes::of(a.v[0] | b.v[0], a.v[1] | b.v[1], a.v[2] | b.v[2], a.v[3] | b.v[3]);
}
// Elsewhere bits of the neighbours move in.
inline Bytes right(Bytes a, int n) {
    return Bytes::of(a.v[0] >> n, a.v[1] >> n, a.v[2] >> n, a.v[3] >> n);
}

// Those of 0 to 255; and the sign of each in the top bit of its byte, whose other bits mean nothing.
inline Bytes to_bytes(Halves a, Halves b) { return Bytes::of(a.v[0], a.v[1], b.v[0], b.v[1]); }
inline Bytes sign_bytes(Halves a, Halves b) {
    return Bytes::of(a.v[0] >> 8, a.v[1] >> 8, b.v[0] >> 8, b.v[1] >> 8);
}

// Floats to the nearest whole numbers from `least` to `most`, which get `bias` and keep the bits of `mask`. NaN becomes
// the least.
struct Whole {
    Vec least, most;
    int bias, mask;

    Whole(float least_, float most_, int bias_, int mask_)
        : least{least_}, most{most_}, bias(bias_), mask(mask_) {}

    // 2^23 + 2^22 is added: the low bits of the sum are the nearest whole number.
    int code(Vec a) const {
        const Vec sum = smaller(larger(a, least), most) + Vec{12582912.0f};
        return (bits(sum).v - 0x4b400000 + bias) & mask;
    }
    Bytes operator()(Vec a, Vec b, Vec c, Vec d) const {
        return Bytes::of(code(a), code(b), code(c), code(d));
    }
};

// kFours codes of four bits, one a byte, into half as many bytes.
enum { kFours = 2 };
inline void join_fours(const uint8_t *codes, uint8_t *out, bool high_first) {
    *out = (uint8_t)(high_first ? codes[0] << 4 | codes[1] : codes[0] | codes[1] << 4);
}

// kSixes codes of six bits, one in the upper bits of a byte when they come back, in three quarters as many bytes; kTwelves codes of 12 bits, one a word.
enum { kSixes = 4, kTwelves = 2 };
inline void store_threes(uint32_t three, uint8_t *out) {
    out[0] = (uint8_t)three;
    out[1] = (uint8_t)(three >> 8);
    out[2] = (uint8_t)(three >> 16);
}
inline uint32_t load_threes(const uint8_t *in) {
    return (uint32_t)in[0] | (uint32_t)in[1] << 8 | (uint32_t)in[2] << 16;
}
inline void join_sixes(const uint8_t *c, uint8_t *out) {
    store_threes((uint32_t)c[0] | (uint32_t)c[1] << 6 | (uint32_t)c[2] << 12 | (uint32_t)c[3] << 18,
                 out);
}
inline void part_sixes(const uint8_t *in, uint8_t *codes) {
    const uint32_t three = load_threes(in);
    for (int i = 0; i < 4; ++i) codes[i] = (uint8_t)(three >> (6 * i) << 2);
}
inline void join_twelves(const uint16_t *codes, uint8_t *out) {
    store_threes((uint32_t)codes[0] | (uint32_t)codes[1] << 12, out);
}
inline void part_twelves(const uint8_t *in, uint16_t *codes) {
    const uint32_t three = load_threes(in);
    codes[0] = (uint16_t)(three & 0xfff);
    codes[1] = (uint16_t)(three >> 12);
}

// Sixteen 16-bit values, looked up by bytes below 16, with `more` set in their upper bytes; and bytes as upper ones.
struct ByteTable {
    const uint16_t *values;

    explicit ByteTable(const uint16_t *sixteen) : values(sixteen) {}
    void look_up(Bytes at, Bytes more, Halves &a, Halves &b) const {
        a = Halves::of(values[at.v[0]] | more.v[0] << 8, values[at.v[1]] | more.v[1] << 8);
        b = Halves::of(values[at.v[2]] | more.v[2] << 8, values[at.v[3]] | more.v[3] << 8);
    }
    static void raise(Bytes upper, Halves &a, Halves &b) {
        a = Halves::of(upper.v[0] << 8, upper.v[1] << 8);
        b = Halves::of(upper.v[2] << 8, upper.v[3] << 8);
    }
};

// Sixteen 16-bit values: what packed codes of four bits stand for.
struct HalfTable {
    enum { codes = 2 };
    const uint16_t *values;

    explicit HalfTable(const uint16_t *sixteen) : values(sixteen) {}
    void spread(const uint8_t *packed, bool high_first, uint16_t *to) const {
        to[high_first ? 1 : 0] = values[*packed & 15];
        to[high_first ? 0 : 1] = values[*packed >> 4];
    }
};

// 64 bytes past the caches, where the processor can; both addresses are multiples of 64.
inline void stream_line(const char *from, char *to) {
    for (int i = 0; i < 64; ++i) to[i] = from[i];
}
inline void settle_streams() {}

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
