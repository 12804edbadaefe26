// SPDX-License-Identifier: Apache-2.0
// Sum of squares. Chunks have a fixed size and are added in order, so the number of threads does not show.
#include <stdlib.h>

#include "buffers.h"
#include "dispatch.h"
#include "pool.h"

namespace {

enum { kTile = 1024, kChunk = 64 * kTile };

struct Norm {
    const Kernels *kernels;
    const char *x;
    int32_t dtype;
    int64_t numel;
    double *sums;  // one a chunk

    double tile(int64_t at, int64_t n) const {
        double lanes[kNormLanes];
        alignas(64) float wide[kTile];
        if (dtype == DS_F64)
            kernels->squares_f64((const double *)x + at, n, lanes);
        else
            kernels->squares(ds::as_floats(kernels, x, dtype, at, n, wide), n, lanes);
        return ds::fold(lanes);
    }

    static void chunk(void *context, int64_t index) {
        const Norm &norm = *(const Norm *)context;
        const int64_t begin = index * kChunk;
        const int64_t end = begin + kChunk < norm.numel ? begin + kChunk : norm.numel;
        double sum = 0;
        for (int64_t at = begin; at < end; at += kTile)
            sum += norm.tile(at, end - at < kTile ? end - at : (int64_t)kTile);
        norm.sums[index] = sum;
    }
};

}  // namespace

extern "C" int ds_squared_norm(const ds_norm_args *args) {
    if (int status = ds::check_struct(args, "ds_squared_norm")) return status;
    if (int status = ds::check_dtype("ds_squared_norm", "x", args->x_dtype, DS_F64)) return status;
    const int64_t each = ds::bytes_of(args->x_dtype);
    const ds::Span spans[] = {{"x", args->x, ds::size_product(args->numel, each), each, false},
                              {"out", args->out, sizeof(double), sizeof(double), true}};
    if (int status = ds::check_spans("ds_squared_norm", spans, 2)) return status;
    const int64_t chunks = (args->numel + kChunk - 1) / kChunk;
    double few[64];
    double *sums = few;
    if (chunks > 64) sums = (double *)malloc(chunks * sizeof(double));
    if (sums == nullptr)
        return ds::fail(DS_NO_MEMORY, "ds_squared_norm: no memory for %lld partial sums",
                        (long long)chunks);
    Norm norm = {ds::kernels(), (const char *)args->x, args->x_dtype, args->numel, sums};
    ds::parallel_for(Norm::chunk, &norm, chunks, args->threads);
    double total = 0;
    for (int64_t i = 0; i < chunks; ++i) total += sums[i];
    *(double *)args->out = total;
    if (sums != few) free(sums);
    return DS_OK;
}
