// SPDX-License-Identifier: Apache-2.0
// Sums of squares of many tensors in double, and whether every element is finite, in two launches.
//
// Squares of 32-bit floats are exact in double, so nothing overflows before the sum does. The order of the sums
// depends on the sizes alone: the same input gives the same bits.
#include "table.cuh"

DS_FN double square(double x) { return x * x; }

DS_KERNEL squared_norm_parts(const i64 *table, i32 tensors, i32 chunk, double *partial) {
    const Part t = part_of_block(table, tensors, chunk);
    const void *x = t.at[0];
    const i32 code = t.code[0];
    const bool by4 = aligned4(x, code);
    const i64 even = by4 ? t.end - (t.end - t.begin) % 4 : t.begin;
    double sum = 0;
    for (i64 i = t.begin + threadIdx.x * 4; i < even; i += kThreads * 4) {
        float v[4];
        unpack4(fetch4(x, code, i), code, v);
        sum += (square(v[0]) + square(v[1])) + (square(v[2]) + square(v[3]));
    }
    for (i64 i = even + threadIdx.x; i < t.end; i += kThreads)
        sum += square(code == kF64 ? ((const double *)x)[i] : (double)load(x, code, i));
    sum = reduce_block<Add>(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block a tensor. `bad` (may be null) counts the tensors with an element that is not finite.
DS_KERNEL squared_norm_sums(const i64 *table, i32 tensors, i64 blocks, const double *partial,
                            double *out, i32 *bad) {
    const i64 row = blockIdx.x;
    const i64 end = row + 1 < tensors ? table[(row + 1) * kColumns] : blocks;
    double sum = 0;
    for (i64 i = table[row * kColumns] + threadIdx.x; i < end; i += kThreads) sum += partial[i];
    sum = reduce_block<Add>(sum);
    if (threadIdx.x == 0) {
        out[row] = sum;
        if (bad && !(sum - sum == 0)) atomicAdd(bad, 1);
    }
}
