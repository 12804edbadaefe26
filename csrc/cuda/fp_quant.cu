// SPDX-License-Identifier: Apache-2.0
// Group quantization to small floats (fp4, fp6, fp8, fp12) and back, packed without gaps.
//
// Packed, four values fill bits/2 bytes, little end first; after each group's bytes comes its scale as four bytes of a
// float32, at no particular alignment. A group is divided by scale = max|x| / (greatest value of the format).
#include "fp_math.cuh"

DS_FN i64 packed_bytes(i64 group_size, i32 bits) { return group_size * bits / 8 + 4; }

DS_FN void write_scale(u8 *at, float scale) {
    const u32 bits = float_to_bits(scale);
    for (i32 k = 0; k < 4; ++k) at[k] = (u8)(bits >> (8 * k));
}

DS_FN float read_scale(const u8 *at) {
    return bits_to_float((u32)at[0] | (u32)at[1] << 8 | (u32)at[2] << 16 | (u32)at[3] << 24);
}

DS_KERNEL fp_quantize(const void *x, i32 code, u8 *out, i64 groups, i64 group_size, i32 exponent_bits,
                      i32 mantissa_bits, i32 stochastic, i64 seed) {
    const Tiny tiny = {exponent_bits, mantissa_bits};
    const i32 bits = 1 + exponent_bits + mantissa_bits;
    for (i64 group = blockIdx.x; group < groups; group += gridDim.x) {
        const i64 begin = group * group_size;
        float most = 0;
        for (i64 i = begin + threadIdx.x; i < begin + group_size; i += kThreads)
            most = Most::of(most, fabsf(load(x, code, i)));
        most = reduce_block<Most>(most);
        const float scale = most == 0 ? 1.0f : most / Tiny::most(tiny);
        u8 *home = out + group * packed_bytes(group_size, bits);
        for (i64 i = threadIdx.x * 4; i < group_size; i += kThreads * 4) {
            u64 four = 0;
            for (i32 k = 0; k < 4; ++k) {
                const float y = load(x, code, begin + i + k) / scale;
                const u32 random = stochastic ? random_bits(seed, begin + i + k) : 0;
                four |= (u64)Tiny::encode(tiny, y, stochastic, random) << (k * bits);
            }
            for (i32 k = 0; k < bits / 2; ++k) home[i / 4 * (bits / 2) + k] = (u8)(four >> (8 * k));
        }
        if (threadIdx.x == 0) write_scale(home + group_size * bits / 8, scale);
    }
}

// `rows` (may be null) names the rows to unpack, each of `row_groups` groups; `groups` counts those written.
DS_KERNEL fp_dequantize(const u8 *packed, void *out, i32 code, i64 groups, i64 group_size,
                        i32 exponent_bits, i32 mantissa_bits, const i64 *rows, i64 row_groups) {
    const Tiny tiny = {exponent_bits, mantissa_bits};
    const i32 bits = 1 + exponent_bits + mantissa_bits;
    for (i64 group = blockIdx.x; group < groups; group += gridDim.x) {
        const i64 from = rows ? rows[group / row_groups] * row_groups + group % row_groups : group;
        const u8 *home = packed + from * packed_bytes(group_size, bits);
        const float scale = read_scale(home + group_size * bits / 8);
        for (i64 i = threadIdx.x * 4; i < group_size; i += kThreads * 4) {
            u64 four = 0;
            for (i32 k = 0; k < bits / 2; ++k) four |= (u64)home[i / 4 * (bits / 2) + k] << (8 * k);
            for (i32 k = 0; k < 4; ++k) {
                const u32 value = (u32)(four >> (k * bits)) & ((1u << bits) - 1);
                store(out, code, group * group_size + i + k, Tiny::decode(tiny, value) * scale);
            }
        }
    }
}
