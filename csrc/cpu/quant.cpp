// SPDX-License-Identifier: Apache-2.0
// Groups of values to whole numbers of few bits and back: finds each group's scale, cuts the work for the threads, and
// walks tiles that stay in the first-level cache from fp32 values to packed codes. See ds_quantize in ds_api.h.
#include "buffers.h"
#include "dispatch.h"
#include "pool.h"

#include <new>

namespace {

enum { kTile = ds::kExtents, kChunk = 32 * kTile, kWidest = 16 };

// Numbers of some groups, with room for the widest vectors. `step` is 1 / scale.
struct Sides {
    alignas(64) float scale[kTile], shift[kTile], offset[kTile], step[kTile];
    float low[kTile], high[kTile];
};

float greatest_of(int32_t dtype) {
    return dtype == DS_F32 ? 3.4028234663852886e38f
                           : dtype == DS_BF16 ? 3.3895313892515355e38f : 65504.0f;
}

// The groups of a call as pieces for the threads: several groups each, or parts of one.
struct Pieces {
    int64_t size, groups_each, parts, count;

    Pieces(int64_t groups, int64_t group_size) : size(group_size) {
        groups_each = size < kChunk ? kChunk / size : 1;
        parts = size < kChunk ? 1 : (size + kChunk - 1) / kChunk;
        count = parts == 1 ? (groups + groups_each - 1) / groups_each : groups * parts;
    }

    int64_t part_size(int64_t part) const {
        const int64_t left = size - part * kChunk;
        return left < kChunk ? left : (int64_t)kChunk;
    }
};

struct Quantize {
    const Kernels *kernels;
    const ds_quantize_args *a;
    Pieces pieces;
    float *low, *high;  // of the parts of large groups
    bool streams;       // past the caches

    float half() const { return (float)(1 << (a->bits - 1)); }

    Grid grid() const {
        const float levels = 2 * half();
        if (a->weights)
            return {a->asym ? levels - 1 : half() - 1, 1, 0, greatest_of(a->x_dtype), 1, a->asym};
        return {levels, a->asym ? 1.0f : 2.0f, half(), 0, 0, a->asym};
    }

    // What the extents of `n` groups lead to; the numbers kept beside the codes are written from group `first` on.
    void resolve(Sides &s, int64_t first, int64_t n, bool keep = true) const {
        const Grid to = grid();
        const int64_t whole = (n + kWidest - 1) / kWidest * kWidest;
        for (int64_t i = n; i < whole; ++i) s.high[i] = s.low[i] = 0;
        if (!a->asym) memset(s.low, 0, (size_t)whole * sizeof(float));
        kernels->scales(&to, s.low, s.high, n, s.scale, s.step, s.offset);
        const int64_t each = ds::bytes_of(a->x_dtype);
        if (!a->weights) {
            memset(s.shift, 0, (size_t)n * sizeof(float));
            if (a->codes && keep) keep_values(s, (float *)a->scale + first * (a->asym ? 2 : 1), n);
            return;
        }
        memcpy(s.shift, s.low, (size_t)n * sizeof(float));
        memset(s.offset, 0, (size_t)n * sizeof(float));
        // Codes are found with the scale as it is stored.
        alignas(64) char stored[4 * kTile];
        ds::narrow(kernels, s.scale, stored, a->x_dtype, n);
        ds::widen(kernels, stored, a->x_dtype, s.scale, n);
        if (!keep) return;
        memcpy((char *)a->scale + first * each, stored, (size_t)(n * each));
        if (a->asym) ds::narrow(kernels, s.low, (char *)a->least + first * each, a->x_dtype, n);
    }

    void keep_values(const Sides &s, float *kept, int64_t n) const {
        if (!a->asym) {
            memcpy(kept, s.step, (size_t)n * sizeof(float));
            return;
        }
        for (int64_t i = 0; i < n; ++i) {
            kept[2 * i] = s.step[i];
            kept[2 * i + 1] = s.offset[i];
        }
    }

    Rounding rounding(const Sides &s) const {
        Rounding r = {s.scale, s.shift, s.offset, s.step, -half(), half() - 1,
                      0,       (1 << a->bits) - 1, a->asym ? kOffset : 0};
        if (a->weights) {
            r.bias = a->asym ? 0 : (int32_t)half() - 1;
            r.least = (float)-r.bias;
            r.most = 2 * half() - 1 - (float)r.bias;
            if (a->asym) r.moved = kShift;
        }
        return r;
    }

    const float *values(int64_t at, int64_t n, float *scratch) const {
        return ds::as_floats(kernels, (const char *)a->x, a->x_dtype, at, n, scratch);
    }

    uint8_t *place_of_codes(int64_t at) const { return (uint8_t *)a->codes + at * a->bits / 8; }

    const char *place(int64_t at) const {
        return (const char *)a->x + at * ds::bytes_of(a->x_dtype);
    }

    // Some whole groups, or a part of one, that fill no more than a tile.
    void round(const Sides &s, int64_t at, int64_t groups, int64_t size) const {
        alignas(64) uint32_t spare[kTile], random[kTile];
        const int64_t n = groups * size;
        const Rounding rule = rounding(s);
        if (a->stochastic) kernels->noise(a->seed, at, n, spare, random);
        const uint32_t *bits = a->stochastic ? random : nullptr;
        if (a->codes == nullptr)
            round_trip(rule, at, groups, size, bits);
        else
            encode(rule, at, groups, size, bits);
    }

    void encode(const Rounding &rule, int64_t at, int64_t groups, int64_t size,
                const uint32_t *random) const {
        alignas(64) uint8_t codes[kTile], made[kTile];
        const int64_t n = groups * size, bytes = n * a->bits / 8;
        uint8_t *home = place_of_codes(at);
        const bool past = streams && ((uintptr_t)home | (uintptr_t)bytes) % 64 == 0;
        uint8_t *to = past ? made : home;
        kernels->quantize[a->x_dtype](place(at), groups, size, &rule, random,
                                      a->bits == 8 ? to : codes);
        if (a->bits != 8) kernels->pack(codes, to, n, a->bits, a->weights != 0);
        if (past) kernels->stream(made, home, bytes);
    }

    void round_trip(const Rounding &rule, int64_t at, int64_t groups, int64_t size,
                    const uint32_t *bits) const {
        alignas(64) float scratch[kTile];
        const int64_t n = groups * size;
        float *x = (float *)values(at, n, scratch);
        kernels->round_trip(x, groups, size, &rule, bits);
        if (a->x_dtype != DS_F32) ds::narrow(kernels, x, (char *)a->x + at * 2, a->x_dtype, n);
    }

    // Groups that are smaller than a tile, as many as fit.
    void small(Sides &s, int64_t group, int64_t n) const {
        const int64_t size = pieces.size, at = group * size;
        extent(at, n, size, s.low, s.high);
        resolve(s, group, n);
        round(s, at, n, size);
    }

    // Extents of some whole groups, or of part of one.
    void extent(int64_t at, int64_t groups, int64_t size, float *low_out, float *high_out) const {
        ds::extents(kernels, place(at), a->x_dtype, groups, size, a->asym ? low_out : nullptr,
                    high_out);
    }

    // A NaN stays.
    static void join(float least, float most, float *low_out, float *high_out) {
        if (least < *low_out || least != least) *low_out = least;
        if (most > *high_out || most != most) *high_out = most;
    }

    void round_part(const Sides &s, int64_t at, int64_t n) const {
        for (int64_t i = 0; i < n; i += kTile)
            round(s, at + i, 1, n - i < kTile ? n - i : (int64_t)kTile);
    }

    static void groups(void *context, int64_t index) {
        const Quantize &q = *(const Quantize *)context;
        q.piece(index);
        if (q.streams) q.kernels->settle();
    }

    void piece(int64_t index) const {
        const int64_t size = pieces.size, begin = index * pieces.groups_each;
        int64_t end = begin + pieces.groups_each;
        if (end > a->groups) end = a->groups;
        Sides s;
        const int64_t fit = size <= kTile ? kTile / size : 1;
        for (int64_t group = begin; group < end; group += fit) {
            if (size <= kTile) {
                small(s, group, end - group < fit ? end - group : fit);
                continue;
            }
            extent(group * size, 1, size, s.low, s.high);
            resolve(s, group, 1);
            round_part(s, group * size, size);
        }
    }

    // Groups larger than a piece take two walks of all threads, with the extents of the parts between.
    static void part_extent(void *context, int64_t index) {
        const Quantize &q = *(const Quantize *)context;
        const int64_t part = index % q.pieces.parts, group = index / q.pieces.parts;
        q.extent(group * q.pieces.size + part * kChunk, 1, q.pieces.part_size(part), q.low + index,
                 q.high + index);
    }

    static void part_round(void *context, int64_t index) {
        const Quantize &q = *(const Quantize *)context;
        const int64_t part = index % q.pieces.parts, group = index / q.pieces.parts;
        Sides s;
        s.low[0] = q.low[group * q.pieces.parts];
        s.high[0] = q.high[group * q.pieces.parts];
        q.resolve(s, group, 1, part == 0);
        q.round_part(s, group * q.pieces.size + part * kChunk, q.pieces.part_size(part));
        if (q.streams) q.kernels->settle();
    }

    void join_parts() {
        for (int64_t group = 0; group < a->groups; ++group) {
            float *least = low + group * pieces.parts, *most = high + group * pieces.parts;
            for (int64_t i = 1; i < pieces.parts; ++i) join(least[i], most[i], least, most);
        }
    }

    // Groups that lie side by side: a block of columns, row by row.
    static void columns(void *context, int64_t index) {
        const Quantize &q = *(const Quantize *)context;
        const int64_t columns = q.a->columns, blocks = (columns + kTile - 1) / kTile;
        const int64_t outer = index / blocks, from = index % blocks * kTile;
        q.block(outer, from, columns - from < kTile ? columns - from : (int64_t)kTile);
    }

    void block(int64_t outer, int64_t from, int64_t n) const {
        alignas(64) float scratch[kTile];
        alignas(64) uint8_t codes[kTile];
        Sides s;
        const int64_t size = a->group_size, columns = a->columns;
        const int64_t top = outer * size * columns + from;
        for (int64_t row = 0; row < size; ++row) {
            const float *x = values(top + row * columns, n, scratch);
            if (row == 0) {
                memcpy(s.low, x, (size_t)n * sizeof(float));
                memcpy(s.high, x, (size_t)n * sizeof(float));
            }
            kernels->extent_columns(x, n, s.low, s.high);
        }
        if (!a->asym)
            for (int64_t i = 0; i < n; ++i)
                if (-s.low[i] > s.high[i]) s.high[i] = -s.low[i];
        resolve(s, outer * columns + from, n);
        const Rounding rule = rounding(s);
        for (int64_t row = 0; row < size; ++row) {
            const int64_t at = top + row * columns;
            const float *x = values(at, n, scratch);
            kernels->quantize_columns(x, n, &rule, codes);
            if (a->bits == 8)
                memcpy(place_of_codes(at), codes, (size_t)n);
            else
                kernels->pack(codes, place_of_codes(at), n, a->bits, a->weights != 0);
        }
    }
};

struct Dequantize {
    const Kernels *kernels;
    const ds_dequantize_args *a;
    Pieces pieces;
    int64_t out_bytes;
    bool streams;  // past the caches

    const uint8_t *unpacked(int64_t at, int64_t n, uint8_t *codes) const {
        const uint8_t *home = (const uint8_t *)a->codes + at * a->bits / 8;
        if (a->bits == 8) return home;
        kernels->unpack(home, codes, n, a->bits, a->weights != 0);
        return codes;
    }

    // Step (of weights: scale), shift and base of `n` groups from `first` on; base is kept in `low`.
    void resolve(Sides &s, int64_t first, int64_t n) const {
        const int64_t each = ds::bytes_of(a->side_dtype);
        if (!a->weights) {
            const float *kept = (const float *)a->scale;
            for (int64_t i = 0; i < n; ++i) {
                const int64_t group = first + i;
                s.step[i] = kept[a->asym ? 2 * group : group];
                s.shift[i] = a->asym ? kept[2 * group + 1] : 0.0f;
                s.low[i] = -0.0f;  // changes nothing, not even the sign of a zero
            }
            return;
        }
        const float half = a->asym ? 0.0f : (float)((1 << (a->bits - 1)) - 1);
        ds::widen(kernels, (const char *)a->scale + first * each, a->side_dtype, s.step, n);
        for (int64_t i = 0; i < n; ++i) {
            s.shift[i] = half;
            s.low[i] = -0.0f;
        }
        if (a->asym)
            ds::widen(kernels, (const char *)a->least + first * each, a->side_dtype, s.low, n);
    }

    char *place(int64_t at) const { return (char *)a->out + at * out_bytes; }

    void part(const Sides &s, int64_t at, int64_t groups, int64_t size) const {
        alignas(64) char made[4 * kTile];
        decode(s, at, groups, size, streams ? made : place(at));
        if (streams) kernels->stream(made, place(at), groups * size * out_bytes);
    }

    void decode(const Sides &s, int64_t at, int64_t groups, int64_t size, char *to) const {
        alignas(64) uint8_t codes[kTile];
        const int sign = a->weights ? 0 : 1;
        if (a->bits == 4 && a->out_dtype != DS_F32 && size % kTableRun == 0) {
            kernels->dequantize_fours[a->out_dtype - DS_BF16][sign](
                (const uint8_t *)a->codes + at / 2, to, groups, size, s.step, s.shift, s.low,
                a->asym);
            return;
        }
        kernels->dequantize[a->out_dtype][sign](unpacked(at, groups * size, codes), to, groups,
                                                size, s.step, s.shift, s.low, a->bits, a->asym);
    }

    static void groups(void *context, int64_t index) {
        const Dequantize &d = *(const Dequantize *)context;
        d.piece(index);
        if (d.streams) d.kernels->settle();
    }

    void piece(int64_t index) const {
        const int64_t size = pieces.size;
        Sides s;
        if (size > kTile) {
            const int64_t parts = pieces.parts;
            int64_t group = parts == 1 ? index * pieces.groups_each : index / parts;
            int64_t last = parts == 1 ? group + pieces.groups_each : group + 1;
            if (last > a->groups) last = a->groups;
            const int64_t from = parts == 1 ? 0 : index % parts * kChunk;
            const int64_t n = parts == 1 ? size : pieces.part_size(index % parts);
            for (; group < last; ++group) {
                resolve(s, group, 1);
                for (int64_t i = 0; i < n; i += kTile)
                    part(s, group * size + from + i, 1, n - i < kTile ? n - i : (int64_t)kTile);
            }
            return;
        }
        const int64_t begin = index * pieces.groups_each, fit = kTile / size;
        int64_t end = begin + pieces.groups_each;
        if (end > a->groups) end = a->groups;
        for (int64_t group = begin; group < end; group += fit) {
            const int64_t n = end - group < fit ? end - group : fit;
            resolve(s, group, n);
            part(s, group * size, n, size);
        }
    }

    static void columns(void *context, int64_t index) {
        const Dequantize &d = *(const Dequantize *)context;
        const int64_t columns = d.a->columns, blocks = (columns + kTile - 1) / kTile;
        const int64_t outer = index / blocks, from = index % blocks * kTile;
        const int64_t n = columns - from < kTile ? columns - from : (int64_t)kTile;
        alignas(64) uint8_t codes[kTile];
        Sides s;
        d.resolve(s, outer * columns + from, n);
        for (int64_t row = 0; row < d.a->group_size; ++row) {
            const int64_t at = (outer * d.a->group_size + row) * columns + from;
            d.kernels->dequantize_columns[d.a->out_dtype](d.unpacked(at, n, codes), d.place(at), n,
                                                          s.step, s.shift, s.low);
        }
    }
};

// What quantizing and its inverse check alike; `numel` receives the number of values.
template <class Args>
int check(const Args *a, const char *name, bool packed, int64_t *numel) {
    const bool bits = packed ? a->bits == 8 || a->bits == 6 || a->bits == 4
                             : a->bits >= 1 && a->bits <= 16;
    if (!bits) return ds::fail(DS_BAD_VALUE, "%s: no codes of %d bits", name, (int)a->bits);
    const bool sizes = a->group_size <= ds::kMostBytes && a->columns <= ds::kMostBytes;
    if (!sizes || a->groups < 0 || a->group_size < 1 || a->columns < 1 || a->groups % a->columns)
        return ds::fail(DS_BAD_VALUE, "%s: %lld groups of %lld values, %lld side by side", name,
                        (long long)a->groups, (long long)a->group_size, (long long)a->columns);
    if (a->columns > 1 && (!a->weights || !packed))
        return ds::fail(DS_BAD_VALUE, "%s: only weights have groups side by side", name);
    if (a->weights && !packed)
        return ds::fail(DS_BAD_VALUE, "%s: weights have codes", name);
    const int64_t run = a->columns > 1 ? a->columns : a->group_size;
    const int64_t unit = !packed || a->bits == 8 ? 1 : a->bits == 6 ? 4 : 2;
    if (run % unit)
        return ds::fail(DS_BAD_VALUE, "%s: %lld values do not fill whole bytes", name, (long long)run);
    *numel = ds::size_product(a->groups, a->group_size);
    if (*numel < 0) return ds::fail(DS_BAD_VALUE, "%s: too many values", name);
    return DS_OK;
}

int64_t column_tasks(int64_t groups, int64_t columns) {
    return groups / columns * ((columns + kTile - 1) / kTile);
}

}  // namespace

extern "C" int ds_quantize(const ds_quantize_args *args) {
    const char *name = "ds_quantize";
    if (int status = ds::check_struct(args, name)) return status;
    const bool packed = args->codes != nullptr;
    int64_t numel = 0;
    if (int status = ds::check_dtype(name, "x", args->x_dtype, DS_F16)) return status;
    if (int status = check(args, name, packed, &numel)) return status;
    if (args->columns > 1 && args->stochastic)
        return ds::fail(DS_BAD_VALUE, "%s: weights are rounded to nearest", name);
    const int64_t each = ds::bytes_of(args->x_dtype), side = args->weights ? each : 4;
    const int64_t sides = args->groups * (args->asym && !args->weights ? 2 : 1);
    const ds::Span spans[] = {
        {"x", args->x, ds::size_product(numel, each), each, !packed},
        {"codes", args->codes, packed ? numel * args->bits / 8 : 0, 1, true},
        {"scale", args->scale, packed ? sides * side : 0, side, true},
        {"least", args->least, packed && args->weights && args->asym ? sides * side : 0, side, true}};
    if (int status = ds::check_spans(name, spans, 4)) return status;
    Quantize q = {ds::kernels(), args, Pieces(args->groups, args->group_size), nullptr, nullptr,
                  false};
    // Of 16-bit values arithmetic decides, and one more copy would cost more than memory gives.
    q.streams = packed && args->x_dtype == DS_F32 && ds::past_caches(args->codes, numel * each, 64);
    if (args->columns > 1) {
        ds::parallel_for(Quantize::columns, &q, column_tasks(args->groups, args->columns),
                         args->threads);
        return DS_OK;
    }
    if (q.pieces.parts == 1) {
        ds::parallel_for(Quantize::groups, &q, q.pieces.count, args->threads);
        return DS_OK;
    }
    float *parts = new (std::nothrow) float[(size_t)(2 * q.pieces.count)];
    if (parts == nullptr)
        return ds::fail(DS_NO_MEMORY, "%s: no memory for %lld extents", name,
                        (long long)q.pieces.count);
    q.low = parts;
    q.high = parts + q.pieces.count;
    ds::parallel_for(Quantize::part_extent, &q, q.pieces.count, args->threads);
    q.join_parts();
    ds::parallel_for(Quantize::part_round, &q, q.pieces.count, args->threads);
    delete[] parts;
    return DS_OK;
}

extern "C" int ds_dequantize(const ds_dequantize_args *args) {
    const char *name = "ds_dequantize";
    if (int status = ds::check_struct(args, name)) return status;
    int64_t numel = 0;
    if (int status = ds::check_dtype(name, "out", args->out_dtype, DS_F16)) return status;
    if (int status = ds::check_dtype(name, "scale", args->side_dtype, DS_F16)) return status;
    if (!args->weights && args->side_dtype != DS_F32)
        return ds::fail(DS_BAD_VALUE, "%s: scale is fp32", name);
    if (int status = check(args, name, true, &numel)) return status;
    const int64_t each = ds::bytes_of(args->out_dtype), side = ds::bytes_of(args->side_dtype);
    const int64_t sides = args->groups * (args->asym && !args->weights ? 2 : 1);
    const ds::Span spans[] = {
        {"codes", args->codes, numel * args->bits / 8, 1, false},
        {"scale", args->scale, sides * side, side, false},
        {"least", args->least, args->weights && args->asym ? sides * side : 0, side, false},
        {"out", args->out, ds::size_product(numel, each), each, true}};
    if (int status = ds::check_spans(name, spans, 4)) return status;
    Dequantize d = {ds::kernels(), args, Pieces(args->groups, args->group_size), each,
                    ds::past_caches(args->out, numel * each, args->group_size * each)};
    if (args->columns > 1)
        ds::parallel_for(Dequantize::columns, &d, column_tasks(args->groups, args->columns),
                         args->threads);
    else
        ds::parallel_for(Dequantize::groups, &d, d.pieces.count, args->threads);
    return DS_OK;
}
