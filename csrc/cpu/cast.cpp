// SPDX-License-Identifier: Apache-2.0
// Casts, and copies between many buffers and one: every dtype by way of fp32 tiles in the first-level cache.
#include "buffers.h"
#include "dispatch.h"
#include "pool.h"

namespace {

enum { kTile = 1024, kChunk = 64 * kTile };

void convert(const Kernels *k, const char *in, int32_t from, char *out, int32_t to, int64_t n) {
    const int64_t in_bytes = ds::bytes_of(from), out_bytes = ds::bytes_of(to);
    if (from == to) {
        memcpy(out, in, (size_t)(n * in_bytes));
    } else if (from == DS_F32) {
        ds::narrow(k, (const float *)in, out, to, n);
    } else if (to == DS_F32) {
        ds::widen(k, in, from, (float *)out, n);
    } else {
        alignas(64) float wide[kTile];
        for (int64_t at = 0; at < n; at += kTile) {
            const int64_t some = n - at < kTile ? n - at : (int64_t)kTile;
            ds::widen(k, in + at * in_bytes, from, wide, some);
            ds::narrow(k, wide, out + at * out_bytes, to, some);
        }
    }
}

struct Cast {
    const Kernels *kernels;
    const ds_cast_args *args;
    bool streams;  // past the caches

    static void chunk(void *context, int64_t index) {
        const Cast &c = *(const Cast *)context;
        const ds_cast_args &a = *c.args;
        const int64_t begin = index * kChunk, left = a.numel - begin;
        const int64_t n = left < kChunk ? left : (int64_t)kChunk, out = ds::bytes_of(a.out_dtype);
        const char *x = (const char *)a.x + begin * ds::bytes_of(a.x_dtype);
        char *home = (char *)a.out + begin * out;
        const int64_t tiles = c.streams ? n / kTile * kTile : 0;
        for (int64_t at = 0; at < tiles; at += kTile) {
            alignas(64) char made[8 * kTile];
            convert(c.kernels, x + at * ds::bytes_of(a.x_dtype), a.x_dtype, made, a.out_dtype, kTile);
            c.kernels->stream(made, home + at * out, kTile * out);
        }
        convert(c.kernels, x + tiles * ds::bytes_of(a.x_dtype), a.x_dtype, home + tiles * out,
                a.out_dtype, n - tiles);
        if (c.streams) c.kernels->settle();
    }
};

// A row of the caller's table.
struct Piece {
    int64_t address, begin, numel, dtype;
};

struct Pieces {
    const Kernels *kernels;
    const ds_pieces_args *args;

    static void chunk(void *context, int64_t index) {
        const Pieces &p = *(const Pieces *)context;
        const int64_t begin = index * kChunk, left = p.args->numel - begin;
        p.span(begin, begin + (left < kChunk ? left : (int64_t)kChunk));
    }

    void span(int64_t begin, int64_t end) const {
        const Piece *table = (const Piece *)args->table;
        int64_t low = 0, high = args->pieces;  // the first piece that ends behind `begin`
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (table[middle].begin + table[middle].numel <= begin)
                low = middle + 1;
            else
                high = middle;
        }
        for (; low < args->pieces && table[low].begin < end; ++low) copy(table[low], begin, end);
    }

    void copy(const Piece &piece, int64_t begin, int64_t end) const {
        const int64_t from = piece.begin > begin ? piece.begin : begin;
        const int64_t last = piece.begin + piece.numel;
        const int64_t to = last < end ? last : end;
        if (from >= to) return;
        char *flat = (char *)args->flat + from * ds::bytes_of(args->flat_dtype);
        const int32_t dtype = (int32_t)piece.dtype;
        char *own = (char *)(uintptr_t)piece.address + (from - piece.begin) * ds::bytes_of(dtype);
        if (args->scatter)
            convert(kernels, flat, args->flat_dtype, own, dtype, to - from);
        else
            convert(kernels, own, dtype, flat, args->flat_dtype, to - from);
    }
};

bool served(int32_t dtype) { return dtype >= DS_F32 && dtype <= DS_E5M2 && dtype != DS_F64; }

}  // namespace

extern "C" int ds_cast(const ds_cast_args *args) {
    if (int status = ds::check_struct(args, "ds_cast")) return status;
    if (!served(args->x_dtype) || !served(args->out_dtype))
        return ds::fail(DS_BAD_VALUE, "ds_cast: dtype codes %d and %d", (int)args->x_dtype,
                        (int)args->out_dtype);
    const int64_t in = ds::bytes_of(args->x_dtype), out = ds::bytes_of(args->out_dtype);
    const ds::Span spans[] = {{"x", args->x, ds::size_product(args->numel, in), in, false},
                              {"out", args->out, ds::size_product(args->numel, out), out, true}};
    if (int status = ds::check_spans("ds_cast", spans, 2)) return status;
    Cast cast = {ds::kernels(), args, ds::past_caches(args->out, args->numel * (in + out), 64)};
    ds::parallel_for(Cast::chunk, &cast, (args->numel + kChunk - 1) / kChunk, args->threads);
    return DS_OK;
}

extern "C" int ds_pieces(const ds_pieces_args *args) {
    if (int status = ds::check_struct(args, "ds_pieces")) return status;
    if (!served(args->flat_dtype))
        return ds::fail(DS_BAD_VALUE, "ds_pieces: dtype code %d", (int)args->flat_dtype);
    const int64_t each = ds::bytes_of(args->flat_dtype);
    const ds::Span spans[] = {
        {"table", args->table, ds::size_product(args->pieces, sizeof(Piece)), 8, false},
        {"flat", args->flat, ds::size_product(args->numel, each), each, true}};
    if (int status = ds::check_spans("ds_pieces", spans, 2)) return status;
    const Piece *table = (const Piece *)args->table;
    for (int64_t i = 0, end = 0; i < args->pieces; ++i) {
        const Piece &piece = table[i];
        if (piece.dtype < DS_F32 || piece.dtype > DS_E5M2 || piece.dtype == DS_F64)
            return ds::fail(DS_BAD_VALUE, "ds_pieces: dtype code %lld", (long long)piece.dtype);
        if (piece.begin < end || piece.numel < 0 || piece.numel > args->numel - piece.begin)
            return ds::fail(DS_BAD_VALUE, "ds_pieces: piece %lld does not lie in the flat buffer",
                            (long long)i);
        end = piece.begin + piece.numel;
        const int64_t own = ds::bytes_of((int32_t)piece.dtype);
        const ds::Span pair[] = {
            spans[1],
            {"piece", (const void *)(uintptr_t)piece.address, piece.numel * own, own, true}};
        if (int status = ds::check_spans("ds_pieces", pair, 2)) return status;
    }
    Pieces pieces = {ds::kernels(), args};
    ds::parallel_for(Pieces::chunk, &pieces, (args->numel + kChunk - 1) / kChunk, args->threads);
    return DS_OK;
}
