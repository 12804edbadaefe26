// SPDX-License-Identifier: Apache-2.0
// Integer quantization of one element: b bits, symmetric or asymmetric, one scale (and offset) a group.
//
// Symmetric: q = round(x * scale), scale = 2^b / (2 max|x|). Asymmetric: q = round(x * scale + offset) with
// scale = 2^b / (max - min) and offset = -2^(b-1) - min * scale. q is clamped to b bits; a group keeps 1 / scale,
// then the offset.
#pragma once
#include "base.cuh"

struct Grid {
    float scale, step, offset;  // step = 1 / scale
    float least, most;          // of q

    DS_FN Grid of(float low, float high, i32 bits, bool asym) {
        Grid g;
        const float levels = (float)(1 << bits);
        const float span = asym ? high - low : 2 * (high > -low ? high : -low);
        g.scale = span == 0 ? 1.0f : levels / span;  // a NaN stays one, so that damage shows
        g.step = 1 / g.scale;
        g.least = -levels / 2;
        g.most = levels / 2 - 1;
        g.offset = asym ? g.least - low * g.scale : 0.0f;
        return g;
    }

    DS_FN i32 quantize(const Grid &g, float x, bool stochastic, i64 seed, i64 index) {
        const float exact = x * g.scale + g.offset;
        const float whole = stochastic ? floorf(exact + random_unit(seed, index)) : rintf(exact);
        // fmax and fmin give the bound for a NaN, so the conversion is always defined
        return (i32)fminf(fmaxf(whole, g.least), g.most);
    }

    DS_FN float dequantize(float q, float step, float offset) { return (q - offset) * step; }
};

// 4-bit values lie two in a byte, the first in the low half.
DS_FN float stored_value(const i8 *q, i32 bits, i64 i) {
    if (bits == 8) return (float)q[i];
    const i32 byte = (u8)q[i / 2];
    const i32 nibble = i % 2 ? byte >> 4 : byte & 15;
    return (float)(nibble >= 8 ? nibble - 16 : nibble);
}
