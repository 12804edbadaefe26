// SPDX-License-Identifier: Apache-2.0
// Group quantization to int8 and int4, its inverse, the in-place round trip, and the reductions of ZeRO++.
//
// One block walks a group twice: its extent, then its values. Groups beyond the grid are taken in further rounds.
#include "quant_math.cuh"

// What is quantized: element i of a tensor, or the sum of the i-th elements of several quantized tensors.
struct Values {
    const void *x;
    i32 code;
    DS_FN float at(const Values &s, i64 i) { return load(s.x, s.code, i); }
};

struct Sums {
    const i8 *q;
    const float *params;
    i64 group_size, numel;  // of one tensor
    i32 tensors, bits, asym;
    float factor;

    DS_FN float at(const Sums &s, i64 i) {
        float sum = 0;
        for (i32 t = 0; t < s.tensors; ++t) {
            const i64 place = t * s.numel + i, group = place / s.group_size;
            const float step = s.params[s.asym ? 2 * group : group];
            const float offset = s.asym ? s.params[2 * group + 1] : 0.0f;
            sum += Grid::dequantize(stored_value(s.q, s.bits, place), step, offset);
        }
        return sum * s.factor;
    }
};

// Error feedback (LoCo): what rounding lost is added to the next input; null turns it off.
struct Feedback {
    void *error;
    i32 code;
    float beta;

    DS_FN float add(const Feedback &f, float x, i64 i) {
        return f.error ? x + load(f.error, f.code, i) : x;
    }
    DS_FN void keep(const Feedback &f, float lost, i64 i) {
        if (f.error) store(f.error, f.code, i, f.beta * load(f.error, f.code, i) + (1 - f.beta) * lost);
    }
};

template <class Source>
DS_FN Grid grid_of_group(const Source &source, const Feedback &feedback, i64 begin, i64 size,
                         i32 bits, bool asym) {
    float low = 0, high = 0;
    if (asym) low = high = Feedback::add(feedback, Source::at(source, begin), begin);
    for (i64 i = begin + threadIdx.x; i < begin + size; i += kThreads) {
        const float x = Feedback::add(feedback, Source::at(source, i), i);
        low = Least::of(low, x);
        high = Most::of(high, x);
    }
    return Grid::of(reduce_block<Least>(low), reduce_block<Most>(high), bits, asym);
}

template <class Source>
DS_FN void quantize_group(const Source &source, const Feedback &feedback, i8 *q, float *params,
                          i64 begin, i64 to, i64 size, i32 bits, bool asym, bool stochastic, i64 seed) {
    const Grid grid = grid_of_group(source, feedback, begin, size, bits, asym);
    if (threadIdx.x == 0) {
        const i64 group = to / size;
        params[asym ? 2 * group : group] = grid.step;
        if (asym) params[2 * group + 1] = grid.offset;
    }
    const i32 each = bits == 4 ? 2 : 1;  // values a byte
    for (i64 i = threadIdx.x * each; i < size; i += kThreads * each) {
        i32 byte = 0;
        for (i32 k = 0; k < each; ++k) {
            const i64 at = begin + i + k;
            const float x = Feedback::add(feedback, Source::at(source, at), at);
            const i32 value = Grid::quantize(grid, x, stochastic, seed, at);
            Feedback::keep(feedback, x - Grid::dequantize((float)value, grid.step, grid.offset), at);
            byte |= bits == 4 ? (value & 15) << (4 * k) : value;
        }
        q[(to + i) / each] = (i8)byte;
    }
}

DS_KERNEL quantize(const void *x, i32 code, i8 *q, float *params, void *error, i32 error_code,
                   float beta, i64 groups, i64 group_size, i32 bits, i32 asym, i32 stochastic,
                   i64 seed) {
    const Values source = {x, code};
    const Feedback feedback = {error, error_code, beta};
    for (i64 group = blockIdx.x; group < groups; group += gridDim.x)
        quantize_group(source, feedback, q, params, group * group_size, group * group_size, group_size,
                       bits, asym, stochastic, seed);
}

// The groups lie as [nodes, devices, pipeline, rest] and are written as [pipeline, devices, nodes, rest], so that
// each all-to-all of the hierarchy sends one run of memory to each peer.
DS_KERNEL swizzle_quantize(const void *x, i32 code, i8 *q, float *params, void *error, i32 error_code,
                           float beta, i64 groups, i64 group_size, i32 bits, i32 asym, i32 pipeline,
                           i32 nodes, i32 devices) {
    const Values source = {x, code};
    const Feedback feedback = {error, error_code, beta};
    const i64 rest = groups / ((i64)pipeline * nodes * devices);
    for (i64 group = blockIdx.x; group < groups; group += gridDim.x) {
        const i64 tail = group % rest, stage = group / rest % pipeline;
        const i64 device = group / rest / pipeline % devices, node = group / rest / pipeline / devices;
        const i64 to = ((stage * devices + device) * nodes + node) * rest + tail;
        quantize_group(source, feedback, q, params, group * group_size, to * group_size, group_size,
                       bits, asym, false, 0);
    }
}

// The sum times `factor` of `tensors` quantized tensors, quantized again into groups of its own.
DS_KERNEL quantized_reduce(const i8 *in, const float *in_params, i8 *q, float *params, void *error,
                           i32 error_code, float beta, i32 tensors, i64 in_group_size, i64 groups,
                           i64 group_size, i32 bits, i32 asym, float factor) {
    const Sums source = {in, in_params, in_group_size, groups * group_size, tensors, bits, asym, factor};
    const Feedback feedback = {error, error_code, beta};
    for (i64 group = blockIdx.x; group < groups; group += gridDim.x)
        quantize_group(source, feedback, q, params, group * group_size, group * group_size, group_size,
                       bits, asym, false, 0);
}

DS_KERNEL dequantize(const i8 *q, const float *params, void *out, i32 code, i64 numel, i64 group_size,
                     i32 bits, i32 asym) {
    const i64 stride = (i64)gridDim.x * kThreads;
    for (i64 i = (i64)blockIdx.x * kThreads + threadIdx.x; i < numel; i += stride) {
        const i64 group = i / group_size;
        const float step = params[asym ? 2 * group : group];
        const float offset = asym ? params[2 * group + 1] : 0.0f;
        store(out, code, i, Grid::dequantize(stored_value(q, bits, i), step, offset));
    }
}

DS_KERNEL fake_quantize(void *x, i32 code, i64 groups, i64 group_size, i32 bits, i32 asym,
                        i32 stochastic, i64 seed) {
    const Values source = {x, code};
    const Feedback none = {nullptr, 0, 0};
    for (i64 group = blockIdx.x; group < groups; group += gridDim.x) {
        const i64 begin = group * group_size;
        const Grid grid = grid_of_group(source, none, begin, group_size, bits, asym);
        for (i64 i = begin + threadIdx.x; i < begin + group_size; i += kThreads) {
            const i32 value = Grid::quantize(grid, load(x, code, i), stochastic, seed, i);
            store(x, code, i, Grid::dequantize((float)value, grid.step, grid.offset));
        }
    }
}
