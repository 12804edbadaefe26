// SPDX-License-Identifier: Apache-2.0
// Groups of values to small floats and back. A packed group holds its codes, then its scale: max|x| over the greatest
// value of the format, as four bytes of a float at no particular alignment.
#include <math.h>

#include "buffers.h"
#include "dispatch.h"
#include "pool.h"

namespace {

enum { kTile = 1024, kChunk = 32 * kTile };

struct Format {
    Tiny form;
    int bits;
    int64_t group_size, packed;  // bytes of a packed group
    float most;                  // the greatest value

    Format(int32_t exponent, int32_t mantissa, int64_t size)
        : form{exponent, mantissa}, bits(1 + exponent + mantissa), group_size(size),
          packed(size * bits / 8 + 4),
          most((float)ldexp(2 - ldexp(1, -mantissa), 1 << (exponent - 1))) {}

    int64_t groups_each() const { return group_size < kChunk ? kChunk / group_size : 1; }
};

struct Pack {
    const Kernels *kernels;
    const ds_fp_quantize_args *a;
    Format format;

    static void groups(void *context, int64_t index) {
        const Pack &p = *(const Pack *)context;
        const int64_t each = p.format.groups_each(), begin = index * each;
        const int64_t end = begin + each < p.a->groups ? begin + each : p.a->groups;
        const int64_t fit = p.format.group_size < kTile ? kTile / p.format.group_size : 1;
        // The greatest sizes of some 16-bit groups are found before those ahead of them are rounded, which nothing has to
        // wait for then. Of fp32, memory would be asked for too much at a time.
        const bool early = p.a->x_dtype != DS_F32;
        float most[2][kTile / 4];
        p.extents(begin, end, fit, most[0]);
        for (int64_t group = begin, turn = 0; group < end; group += fit, turn ^= 1) {
            if (early) p.extents(group + fit, end, fit, most[turn ^ 1]);
            for (int64_t i = 0; i < fit && group + i < end; ++i)
                p.one(group + i, most[turn][i] == 0 ? 1.0f : most[turn][i] / p.format.most);
            if (!early) p.extents(group + fit, end, fit, most[turn ^ 1]);
        }
    }

    // Of up to `fit` groups.
    void extents(int64_t group, int64_t end, int64_t fit, float *most) const {
        if (group >= end) return;
        ds::extents(kernels, place(group * format.group_size), a->x_dtype,
                    end - group < fit ? end - group : fit, format.group_size, nullptr, most);
    }

    void one(int64_t group, float scale) const {
        const int64_t size = format.group_size, at = group * size;
        uint8_t *home = (uint8_t *)a->out + group * format.packed;
        for (int64_t i = 0; i < size; i += kTile)
            encode(at + i, size - i < kTile ? size - i : (int64_t)kTile, scale,
                   home + i * format.bits / 8);
        uint32_t bits;
        memcpy(&bits, &scale, 4);
        for (int k = 0; k < 4; ++k) home[format.packed - 4 + k] = (uint8_t)(bits >> (8 * k));
    }

    const char *place(int64_t at) const {
        return (const char *)a->x + at * ds::bytes_of(a->x_dtype);
    }

    void encode(int64_t at, int64_t n, float scale, uint8_t *to) const {
        alignas(64) uint32_t spare[kTile], random[kTile];
        alignas(64) uint16_t codes[kTile];
        if (a->stochastic) kernels->noise(a->seed, at, n, spare, random);
        const uint32_t *bits = a->stochastic ? random : nullptr;
        if (format.bits == 12) {
            kernels->encode_wide[a->x_dtype](place(at), codes, n, scale, format.form, bits);
            kernels->pack_wide(codes, to, n);
        } else if (format.bits == 8) {
            kernels->encode_narrow[a->x_dtype](place(at), to, n, scale, format.form, bits);
        } else {
            kernels->encode_narrow[a->x_dtype](place(at), codes, n, scale, format.form, bits);
            kernels->pack((uint8_t *)codes, to, n, format.bits, false);
        }
    }
};

struct Unpack {
    const Kernels *kernels;
    const ds_fp_dequantize_args *a;
    Format format;
    bool streams;  // past the caches

    static void groups(void *context, int64_t index) {
        const Unpack &u = *(const Unpack *)context;
        const int64_t each = u.format.groups_each(), begin = index * each;
        const int64_t end = begin + each < u.a->groups ? begin + each : u.a->groups;
        for (int64_t group = begin; group < end; ++group) u.one(group);
        if (u.streams) u.kernels->settle();
    }

    void one(int64_t group) const {
        alignas(64) char made[4 * kTile];
        const int64_t *rows = (const int64_t *)a->rows;
        const int64_t from =
            rows ? rows[group / a->row_groups] * a->row_groups + group % a->row_groups : group;
        const int64_t size = format.group_size, out_bytes = ds::bytes_of(a->out_dtype);
        const uint8_t *home = (const uint8_t *)a->packed + from * format.packed;
        const uint8_t *last = home + format.packed - 4;
        const uint32_t bits = (uint32_t)last[0] | (uint32_t)last[1] << 8 | (uint32_t)last[2] << 16 |
                              (uint32_t)last[3] << 24;
        float scale;
        memcpy(&scale, &bits, 4);
        for (int64_t i = 0; i < size; i += kTile) {
            const int64_t n = size - i < kTile ? size - i : (int64_t)kTile;
            const uint8_t *in = home + i * format.bits / 8;
            char *home_of_values = (char *)a->out + (group * size + i) * out_bytes;
            decode(in, n, scale, streams ? made : home_of_values);
            if (streams) kernels->stream(made, home_of_values, n * out_bytes);
        }
    }

    void decode(const uint8_t *in, int64_t n, float scale, char *to) const {
        alignas(64) uint16_t codes[kTile];
        if (format.bits == 12) {
            kernels->unpack_wide(in, codes, n);
            kernels->decode_wide[a->out_dtype](codes, to, n, scale, format.form);
            return;
        }
        if (format.bits != 8) kernels->unpack(in, (uint8_t *)codes, n, format.bits, false);
        kernels->decode_narrow[a->out_dtype](format.bits == 8 ? in : (uint8_t *)codes, to, n, scale,
                                             format.form);
    }
};

int check_format(const char *name, int32_t exponent, int32_t mantissa, int64_t groups, int64_t size) {
    const bool known = (exponent == 4 && (mantissa == 3 || mantissa == 7)) ||
                       (exponent == 3 && mantissa == 2) || (exponent == 2 && mantissa == 1);
    if (!known)
        return ds::fail(DS_BAD_VALUE, "%s: no small float of %d exponent and %d mantissa bits", name,
                        (int)exponent, (int)mantissa);
    if (groups < 0 || size < 4 || size % 4 || size > ds::kMostBytes / 16 || ds::size_product(ds::size_product(groups, size), 4) < 0)
        return ds::fail(DS_BAD_VALUE, "%s: %lld groups of %lld values", name, (long long)groups,
                        (long long)size);
    return DS_OK;
}

}  // namespace

extern "C" int ds_fp_quantize(const ds_fp_quantize_args *args) {
    const char *name = "ds_fp_quantize";
    if (int status = ds::check_struct(args, name)) return status;
    if (int status = ds::check_dtype(name, "x", args->x_dtype, DS_F16)) return status;
    if (int status = check_format(name, args->exponent, args->mantissa, args->groups,
                                  args->group_size))
        return status;
    Pack pack = {ds::kernels(), args, Format(args->exponent, args->mantissa, args->group_size)};
    const int64_t each = ds::bytes_of(args->x_dtype);
    const ds::Span spans[] = {
        {"x", args->x, args->groups * args->group_size * each, each, false},
        {"out", args->out, ds::size_product(args->groups, pack.format.packed), 1, true}};
    if (int status = ds::check_spans(name, spans, 2)) return status;
    const int64_t some = pack.format.groups_each();
    ds::parallel_for(Pack::groups, &pack, (args->groups + some - 1) / some, args->threads);
    return DS_OK;
}

extern "C" int ds_fp_dequantize(const ds_fp_dequantize_args *args) {
    const char *name = "ds_fp_dequantize";
    if (int status = ds::check_struct(args, name)) return status;
    if (int status = ds::check_dtype(name, "out", args->out_dtype, DS_F16)) return status;
    if (int status = check_format(name, args->exponent, args->mantissa, args->groups,
                                  args->group_size))
        return status;
    Unpack unpack = {ds::kernels(), args, Format(args->exponent, args->mantissa, args->group_size),
                     false};
    const int64_t *rows = (const int64_t *)args->rows;
    if (rows == nullptr ? args->groups != args->there
                        : args->row_groups < 1 || args->there % args->row_groups ||
                              args->groups % args->row_groups)
        return ds::fail(DS_BAD_VALUE, "%s: %lld groups wanted of %lld, %lld a row", name,
                        (long long)args->groups, (long long)args->there,
                        (long long)args->row_groups);
    const int64_t each = ds::bytes_of(args->out_dtype);
    const int64_t wanted = rows == nullptr ? 0 : args->groups / args->row_groups;
    const ds::Span spans[] = {
        {"packed", args->packed, ds::size_product(args->there, unpack.format.packed), 1, false},
        {"rows", args->rows, wanted * 8, 8, false},
        {"out", args->out, args->groups * args->group_size * each, each, true}};
    if (int status = ds::check_spans(name, spans, 3)) return status;
    const int64_t run = args->group_size * each;
    unpack.streams = ds::past_caches(args->out, args->groups * run, run);
    for (int64_t i = 0; i < wanted; ++i)
        if (rows[i] < 0 || rows[i] >= args->there / args->row_groups)
            return ds::fail(DS_BAD_VALUE, "%s: row %lld of %lld", name, (long long)rows[i],
                            (long long)(args->there / args->row_groups));
    const int64_t some = unpack.format.groups_each();
    ds::parallel_for(Unpack::groups, &unpack, (args->groups + some - 1) / some, args->threads);
    return DS_OK;
}
