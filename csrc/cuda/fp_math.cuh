// SPDX-License-Identifier: Apache-2.0
// Small floats of e exponent and m mantissa bits, with subnormals and without infinities or NaNs.
#pragma once
#include "base.cuh"

struct Tiny {
    i32 exponent, mantissa;  // bits

    DS_FN i32 least_exponent(const Tiny &t) { return 2 - (1 << (t.exponent - 1)); }

    // The greatest value: all bits set.
    DS_FN float most(const Tiny &t) {
        return decode(t, (1u << (t.exponent + t.mantissa)) - 1);
    }

    // Rounds to nearest even, or up with the probability that `random` bits give; too large becomes the greatest.
    DS_FN u32 encode(const Tiny &t, float x, bool stochastic, u32 random) {
        const u32 bits = float_to_bits(x), size = bits & 0x7fffffff;
        const u32 greatest = (1u << (t.exponent + t.mantissa)) - 1;
        u32 code = greatest;
        if (size < 0x7f800000) {
            const i32 exponent = (i32)(size >> 23) - 127, least = least_exponent(t);
            const i32 below = exponent < least ? least - exponent : 0;
            i32 drop = 23 - t.mantissa + below;  // bits that go
            drop = drop > 31 ? 31 : drop;
            const u32 whole = size >> 23 ? (size & 0x7fffff) | 0x800000 : 0;
            const u32 nearest = (1u << (drop - 1)) - 1 + ((whole >> drop) & 1);
            const u32 rounded = (whole + (stochastic ? random & ((1u << drop) - 1) : nearest)) >> drop;
            // a carry out of the mantissa moves into the exponent by itself
            code = below ? rounded : ((u32)(exponent - least) << t.mantissa) + rounded;
            code = code > greatest ? greatest : code;
        }
        return code | (bits >> 31) << (t.exponent + t.mantissa);
    }

    DS_FN float decode(const Tiny &t, u32 code) {
        const u32 fraction = code & ((1u << t.mantissa) - 1);
        const i32 field = (i32)(code >> t.mantissa) & ((1 << t.exponent) - 1);
        const u32 whole = field ? fraction | 1u << t.mantissa : fraction;
        const i32 power = (field ? field - 1 : 0) + least_exponent(t) - t.mantissa;
        const float size = (float)whole * bits_to_float((u32)(power + 127) << 23);
        return code >> (t.exponent + t.mantissa) & 1 ? -size : size;
    }
};
