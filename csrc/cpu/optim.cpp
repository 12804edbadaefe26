// SPDX-License-Identifier: Apache-2.0
// The optimizer entries: check the arguments, cut the buffers into chunks for the threads and tiles for the cache.
//
// A tile is small enough for the first-level cache. Its 16-bit buffers are widened into fp32 scratch, the fp32 kernel
// runs, and the results are rounded back; fp32 buffers are worked on in place. So any mix of dtypes costs one kernel.
#include <math.h>

#include "../api/ds_api.h"
#include "../api/error.h"
#include "dispatch.h"
#include "pool.h"

namespace {

enum {
    kTile = 512,
    kChunk = 32 * kTile,  // a thread's unit of work: 256 KiB of fp32
};

struct Buffer {
    char *data;
    int32_t dtype;
};

// One tile of a buffer as fp32: in place, or a widened copy in `scratch`.
struct Tile {
    float *f32;
    char *home;
    int32_t dtype;
};

inline int64_t bytes_of(int32_t dtype) { return dtype == DS_F32 ? 4 : 2; }

Tile open(const Kernels *k, const Buffer &buffer, int64_t at, int64_t n, float *scratch) {
    Tile tile = {scratch, buffer.data + at * bytes_of(buffer.dtype), buffer.dtype};
    if (tile.dtype == DS_F32)
        tile.f32 = (float *)tile.home;
    else if (tile.dtype == DS_BF16)
        k->from_bf16((const uint16_t *)tile.home, scratch, n);
    else
        k->from_f16((const uint16_t *)tile.home, scratch, n);
    return tile;
}

void narrow(const Kernels *k, const float *from, char *home, int32_t dtype, int64_t n) {
    if (dtype == DS_BF16)
        k->to_bf16(from, (uint16_t *)home, n);
    else if (dtype == DS_F16)
        k->to_f16(from, (uint16_t *)home, n);
    else
        for (int64_t i = 0; i < n; ++i) ((float *)home)[i] = from[i];
}

void close(const Kernels *k, const Tile &tile, int64_t n) {
    if (tile.dtype != DS_F32) narrow(k, tile.f32, tile.home, tile.dtype, n);
}

// One optimizer step over all elements; `moments` is 1 or 2.
template <class Constants>
struct Step {
    const Kernels *kernels;
    Constants constants;
    int64_t numel;
    Buffer param, moment[2], grad, low;

    static void chunk(void *context, int64_t index) {
        const Step &s = *(const Step *)context;
        const int64_t begin = index * kChunk;
        const int64_t end = begin + kChunk < s.numel ? begin + kChunk : s.numel;
        for (int64_t at = begin; at < end; at += kTile)
            s.tile(at, end - at < kTile ? end - at : (int64_t)kTile);
    }

    void tile(int64_t at, int64_t n) const {
        alignas(64) float scratch[4][kTile];
        const Kernels *k = kernels;
        const Tile p = open(k, param, at, n, scratch[0]);
        const Tile g = open(k, grad, at, n, scratch[1]);
        const Tile first = open(k, moment[0], at, n, scratch[2]);
        if (moment[1].data != nullptr) {
            const Tile second = open(k, moment[1], at, n, scratch[3]);
            apply(p.f32, first.f32, second.f32, g.f32, n);
            close(k, second, n);
        } else {
            apply(p.f32, first.f32, nullptr, g.f32, n);
        }
        close(k, p, n);
        close(k, first, n);
        if (low.data != nullptr)
            narrow(k, p.f32, low.data + at * bytes_of(low.dtype), low.dtype, n);
    }

    void apply(float *p, float *first, float *second, const float *g, int64_t n) const;

    int run(uint32_t threads) {
        const int64_t chunks = (numel + kChunk - 1) / kChunk;
        ds::parallel_for(chunk, this, chunks, threads);
        return DS_OK;
    }
};

template <>
void Step<AdamConstants>::apply(float *p, float *m, float *v, const float *g, int64_t n) const {
    kernels->adam(p, m, v, g, n, &constants);
}

template <>
void Step<AdagradConstants>::apply(float *p, float *v, float *, const float *g, int64_t n) const {
    kernels->adagrad(p, v, g, n, &constants);
}

template <>
void Step<LionConstants>::apply(float *p, float *m, float *, const float *g, int64_t n) const {
    kernels->lion(p, m, g, n, &constants);
}

template <class Args>
int check(const Args *args, const char *name) {
    if (args == nullptr || args->size != sizeof(Args))
        return ds::fail(DS_BAD_STRUCT, "%s: struct of %u bytes given, %u expected", name,
                        args == nullptr ? 0u : args->size, (unsigned)sizeof(Args));
    if (args->numel < 0)
        return ds::fail(DS_BAD_VALUE, "%s: numel is %lld", name, (long long)args->numel);
    const int32_t codes[] = {args->param_dtype, args->state_dtype, args->grad_dtype,
                             args->low_dtype};
    for (int32_t code : codes)
        if (code < DS_F32 || code > DS_F16)
            return ds::fail(DS_BAD_VALUE, "%s: dtype code %d is not served", name, (int)code);
    return DS_OK;
}

template <class Constants, class Args>
Step<Constants> begin(const Args *args, void *first, void *second) {
    Step<Constants> step;
    step.kernels = ds::kernels();
    step.numel = args->numel;
    step.param = {(char *)args->param, args->param_dtype};
    step.moment[0] = {(char *)first, args->state_dtype};
    step.moment[1] = {(char *)second, args->state_dtype};
    step.grad = {(char *)args->grad, args->grad_dtype};
    step.low = {(char *)args->low, args->low_dtype};
    return step;
}

}  // namespace

extern "C" int ds_adam_step(const ds_adam_args *args) {
    if (int status = check(args, "ds_adam_step")) return status;
    if (args->step < 1)
        return ds::fail(DS_BAD_VALUE, "ds_adam_step: step is %lld, the first is 1",
                        (long long)args->step);
    Step<AdamConstants> step = begin<AdamConstants>(args, args->exp_avg, args->exp_avg_sq);
    const double n = (double)args->step;
    const double bias1 = args->bias_correction ? 1 - pow(args->beta1, n) : 1;
    const double bias2 = args->bias_correction ? 1 - pow(args->beta2, n) : 1;
    AdamConstants &c = step.constants;
    c.grad_scale = (float)args->grad_scale;
    c.l2 = args->decoupled ? 0 : (float)args->decay;
    c.keep = args->decoupled ? (float)(1 - args->lr * args->decay) : 1;
    c.beta1_rest = (float)(1 - args->beta1);
    c.beta2 = (float)args->beta2;
    c.beta2_rest = (float)(1 - args->beta2);
    c.inv_root_bias2 = (float)(1 / sqrt(bias2));
    c.eps = (float)args->eps;
    c.step_size = (float)(args->lr / bias1);
    return step.run(args->threads);
}

extern "C" int ds_adagrad_step(const ds_adagrad_args *args) {
    if (int status = check(args, "ds_adagrad_step")) return status;
    Step<AdagradConstants> step = begin<AdagradConstants>(args, args->exp_avg_sq, nullptr);
    AdagradConstants &c = step.constants;
    c.grad_scale = (float)args->grad_scale;
    c.l2 = (float)args->decay;
    c.eps = (float)args->eps;
    c.lr = (float)args->lr;
    return step.run(args->threads);
}

extern "C" int ds_lion_step(const ds_lion_args *args) {
    if (int status = check(args, "ds_lion_step")) return status;
    Step<LionConstants> step = begin<LionConstants>(args, args->exp_avg, nullptr);
    LionConstants &c = step.constants;
    c.grad_scale = (float)args->grad_scale;
    c.keep = (float)(1 - args->lr * args->decay);
    c.beta1_rest = (float)(1 - args->beta1);
    c.beta2_rest = (float)(1 - args->beta2);
    c.lr = (float)args->lr;
    return step.run(args->threads);
}
