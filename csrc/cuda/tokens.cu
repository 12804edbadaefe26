// SPDX-License-Identifier: Apache-2.0
// Random layer-wise token dropping: sort the kept tokens, gather and scatter their rows, cut attention masks.
#include "base.cuh"

enum { kSortLimit = 8192 };  // tokens a row: 32 KiB of shared memory

// Sorts each row ascending in place (bitonic, padded to a power of two).
DS_KERNEL token_sort(i32 *tokens, i64 rows, i32 length) {
    DS_SHARED i32 row[kSortLimit];
    i32 padded = 1;
    while (padded < length) padded *= 2;
    for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
        i32 *home = tokens + r * length;
        for (i32 i = threadIdx.x; i < padded; i += kThreads)
            row[i] = i < length ? home[i] : 0x7fffffff;
        for (i32 run = 2; run <= padded; run *= 2)
            for (i32 away = run / 2; away; away /= 2) {
                __syncthreads();
                for (i32 i = threadIdx.x; i < padded; i += kThreads) {
                    const i32 other = i ^ away;
                    if (other > i && (row[i] > row[other]) == ((i & run) == 0)) {
                        const i32 held = row[i];
                        row[i] = row[other];
                        row[other] = held;
                    }
                }
            }
        __syncthreads();
        for (i32 i = threadIdx.x; i < length; i += kThreads) home[i] = row[i];
        __syncthreads();
    }
}

// Copies `bytes` with the block, in the widest words that both ends allow.
DS_FN void copy_row(char *to, const char *from, i64 bytes) {
    const u64 both = (u64)to | (u64)from | (u64)bytes;
    if ((both & 15) == 0) {
        for (i64 i = threadIdx.x; i < bytes / 16; i += kThreads)
            ((Words4 *)to)[i] = ((const Words4 *)from)[i];
    } else if ((both & 3) == 0) {
        for (i64 i = threadIdx.x; i < bytes / 4; i += kThreads) ((u32 *)to)[i] = ((const u32 *)from)[i];
    } else {
        for (i64 i = threadIdx.x; i < bytes; i += kThreads) to[i] = from[i];
    }
}

// Row (b, s) of an activation that lies as [batch, tokens, ...] or [tokens, batch, ...].
DS_FN i64 row_at(i64 b, i64 s, i64 batch, i64 tokens, i32 batch_first) {
    return batch_first ? b * tokens + s : s * batch + b;
}

// kept(b, k) = full(b, index[b, k]), or the other way round when `scatter` is set. An index outside the tokens is
// passed over: the row it would touch is somebody else's memory.
DS_KERNEL token_move(char *full, char *kept, const i32 *index, i64 batch, i64 tokens, i64 keep,
                     i64 bytes, i32 batch_first, i32 scatter) {
    for (i64 row = blockIdx.x; row < batch * keep; row += gridDim.x) {
        const i64 b = row / keep, k = row % keep, s = index[row];
        if (s < 0 || s >= tokens) continue;
        char *there = full + row_at(b, s, batch, tokens, batch_first) * bytes;
        char *here = kept + row_at(b, k, batch, keep, batch_first) * bytes;
        copy_row(scatter ? there : here, scatter ? here : there, bytes);
    }
}

// out[l, b, h, i, j] = mask[b, h, index[l, b, i], index[l, b, j]]; without an index, its upper left corner.
DS_KERNEL mask_slice(const char *mask, char *out, const i32 *index, i64 layers, i64 batch, i64 heads,
                     i64 tokens, i64 keep, i32 bytes) {
    for (i64 row = blockIdx.x; row < layers * batch * heads * keep; row += gridDim.x) {
        const i64 i = row % keep, h = row / keep % heads, b = row / keep / heads % batch;
        const i64 l = row / keep / heads / batch;
        const i32 *kept = index ? index + (l * batch + b) * keep : nullptr;
        const i64 from = kept ? kept[i] : i;
        if (from < 0 || from >= tokens) continue;
        const char *home = mask + ((b * heads + h) * tokens + from) * tokens * bytes;
        for (i64 j = threadIdx.x; j < keep; j += kThreads) {
            const i64 column = kept ? kept[j] : j;
            if (column < 0 || column >= tokens) continue;
            for (i32 k = 0; k < bytes; ++k)
                out[(row * keep + j) * bytes + k] = home[column * bytes + k];
        }
    }
}
