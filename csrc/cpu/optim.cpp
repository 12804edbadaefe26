// SPDX-License-Identifier: Apache-2.0
// The optimizer entries: check the arguments, cut the buffers into chunks for the threads and tiles for the cache.
//
// The kernels read and write any mix of dtypes. Only where a copy of the new param is wanted beside it (`low`), the
// param passes through fp32 tiles that stay in the first-level cache until the copy is made.
#include <math.h>

#include <new>

#include "buffers.h"
#include "dispatch.h"
#include "pool.h"

namespace {

enum {
    kTile = 512,
    kChunk = 64 * kTile,  // a thread's unit of work: 128 KiB of fp32
};

struct Buffer {
    char *data;
    int32_t dtype;
};

inline char *place(const Buffer &buffer, int64_t at) {
    return buffer.data == nullptr ? nullptr : buffer.data + at * ds::bytes_of(buffer.dtype);
}

// One optimizer step over all elements.
struct Step {
    const Kernels *kernels;
    Sweep sweep;
    const void *constants;
    int64_t numel;
    Buffer param, first, second, grad, low;

    static void chunk(void *context, int64_t index) {
        const Step &s = *(const Step *)context;
        const int64_t begin = index * kChunk;
        const int64_t end = begin + kChunk < s.numel ? begin + kChunk : s.numel;
        const int64_t tile = s.low.data == nullptr ? kChunk : kTile;
        for (int64_t at = begin; at < end; at += tile)
            s.part(at, end - at < tile ? end - at : tile);
    }

    void part(int64_t at, int64_t n) const {
        alignas(64) float scratch[kTile];
        char *home = place(param, at);
        char *p = home;
        const bool through = low.data != nullptr && param.dtype != DS_F32;
        if (through) {
            ds::widen(kernels, home, param.dtype, scratch, n);
            p = (char *)scratch;
        }
        sweep(p, place(first, at), place(second, at), place(grad, at), n, constants);
        if (through) ds::narrow(kernels, scratch, home, param.dtype, n);
        if (low.data != nullptr) ds::narrow(kernels, (float *)p, place(low, at), low.dtype, n);
    }
};

// Adam of bf16 params that have no master: the same walk, with random bits of each element.
struct RandomStep {
    const Kernels *kernels;
    RandomSweep sweep;
    const void *constants;
    int64_t numel, seed;
    Buffer param, first, second, grad;

    static void chunk(void *context, int64_t index) {
        const RandomStep &s = *(const RandomStep *)context;
        const int64_t begin = index * kChunk;
        const int64_t end = begin + kChunk < s.numel ? begin + kChunk : s.numel;
        for (int64_t at = begin; at < end; at += kTile) {
            alignas(64) uint32_t low[kTile], high[kTile];
            const int64_t n = end - at < kTile ? end - at : (int64_t)kTile;
            s.kernels->noise(s.seed, at, n, low, high);
            s.sweep((uint16_t *)place(s.param, at), place(s.first, at), place(s.second, at),
                    place(s.grad, at), low, high, n, s.constants);
        }
    }
};

template <class Args>
int check(const Args *args, const char *name, const void *first, const void *second, int moments) {
    if (args->numel < 0)
        return ds::fail(DS_BAD_VALUE, "%s: numel is %lld", name, (long long)args->numel);
    const struct {
        const char *what;
        int32_t code;
    } codes[] = {{"param", args->param_dtype},
                 {"the moments", args->state_dtype},
                 {"grad", args->grad_dtype},
                 {"low", args->low_dtype}};
    for (const auto &each : codes)
        if (int status = ds::check_dtype(name, each.what, each.code, DS_F16)) return status;
    const auto span = [&](const char *what, const void *at, int32_t dtype, bool written) {
        const int64_t each = ds::bytes_of(dtype);
        return ds::Span{what, at, ds::size_product(args->numel, each), each, written};
    };
    ds::Span spans[5] = {span("param", args->param, args->param_dtype, true),
                         span("grad", args->grad, args->grad_dtype, false)};
    int count = 2;
    if (moments >= 1) spans[count++] = span("the first moment", first, args->state_dtype, true);
    if (moments == 2) spans[count++] = span("the second moment", second, args->state_dtype, true);
    if (args->low) spans[count++] = span("low", args->low, args->low_dtype, true);
    return ds::check_spans(name, spans, count);
}

template <class Args>
int run(const Args *args, int rule, void *first, void *second, const void *constants) {
    Step step;
    const bool through = args->low != nullptr;  // then the kernel sees an fp32 param
    step.kernels = ds::kernels();
    step.sweep = step.kernels->sweep[rule][through ? (int)DS_F32 : args->param_dtype]
                                    [args->state_dtype][args->grad_dtype];
    step.constants = constants;
    step.numel = args->numel;
    step.param = {(char *)args->param, args->param_dtype};
    step.first = {(char *)first, args->state_dtype};
    step.second = {(char *)second, args->state_dtype};
    step.grad = {(char *)args->grad, args->grad_dtype};
    step.low = {(char *)args->low, args->low_dtype};
    ds::parallel_for(Step::chunk, &step, (args->numel + kChunk - 1) / kChunk, args->threads);
    return DS_OK;
}

int run_random(const ds_adam_args *args, const AdamConstants *constants) {
    if (args->param_dtype != DS_BF16 || args->state_dtype == DS_F16 || args->low != nullptr)
        return ds::fail(DS_BAD_VALUE,
                        "ds_adam_step: rounding at random is for bf16 params, moments of bf16 or "
                        "fp32, and no copy");
    RandomStep step;
    step.kernels = ds::kernels();
    step.sweep = step.kernels->random_adam[args->state_dtype][args->grad_dtype];
    step.constants = constants;
    step.numel = args->numel;
    step.seed = args->seed;
    step.param = {(char *)args->param, args->param_dtype};
    step.first = {(char *)args->exp_avg, args->state_dtype};
    step.second = {(char *)args->exp_avg_sq, args->state_dtype};
    step.grad = {(char *)args->grad, args->grad_dtype};
    ds::parallel_for(RandomStep::chunk, &step, (args->numel + kChunk - 1) / kChunk, args->threads);
    return DS_OK;
}

}  // namespace

extern "C" int ds_adam_step(const ds_adam_args *args) {
    if (int status = ds::check_struct(args, "ds_adam_step")) return status;
    if (int status = check(args, "ds_adam_step", args->exp_avg, args->exp_avg_sq, 2)) return status;
    if (args->step < 1)
        return ds::fail(DS_BAD_VALUE, "ds_adam_step: step is %lld, the first is 1",
                        (long long)args->step);
    const double n = (double)args->step;
    const double bias1 = args->bias_correction ? 1 - pow(args->beta1, n) : 1;
    const double bias2 = args->bias_correction ? 1 - pow(args->beta2, n) : 1;
    AdamConstants c;
    c.grad_scale = (float)args->grad_scale;
    c.l2 = args->decoupled ? 0 : (float)args->decay;
    c.keep = args->decoupled ? (float)(1 - args->lr * args->decay) : 1;
    c.beta1_rest = (float)(1 - args->beta1);
    c.beta2 = (float)args->beta2;
    c.beta2_rest = (float)(1 - args->beta2);
    c.inv_root_bias2 = (float)(1 / sqrt(bias2));
    c.eps = (float)args->eps;
    c.step_size = (float)(args->lr / bias1);
    if (args->stochastic) return run_random(args, &c);
    return run(args, kAdam, args->exp_avg, args->exp_avg_sq, &c);
}

extern "C" int ds_adagrad_step(const ds_adagrad_args *args) {
    if (int status = ds::check_struct(args, "ds_adagrad_step")) return status;
    if (int status = check(args, "ds_adagrad_step", args->exp_avg_sq, nullptr, 1)) return status;
    AdagradConstants c;
    c.grad_scale = (float)args->grad_scale;
    c.l2 = (float)args->decay;
    c.eps = (float)args->eps;
    c.lr = (float)args->lr;
    return run(args, kAdagrad, args->exp_avg_sq, nullptr, &c);
}

extern "C" int ds_lion_step(const ds_lion_args *args) {
    if (int status = ds::check_struct(args, "ds_lion_step")) return status;
    if (int status = check(args, "ds_lion_step", args->exp_avg, nullptr, 1)) return status;
    LionConstants c;
    c.grad_scale = (float)args->grad_scale;
    c.keep = (float)(1 - args->lr * args->decay);
    c.beta1_rest = (float)(1 - args->beta1);
    c.beta2_rest = (float)(1 - args->beta2);
    c.lr = (float)args->lr;
    return run(args, kLion, args->exp_avg, nullptr, &c);
}

extern "C" int ds_sgd_step(const ds_sgd_args *args) {
    if (int status = ds::check_struct(args, "ds_sgd_step")) return status;
    const bool plain = args->momentum == 0;
    if (int status = check(args, "ds_sgd_step", args->exp_avg, nullptr, plain ? 0 : 1)) return status;
    SgdConstants c;
    c.grad_scale = (float)args->grad_scale;
    c.l2 = (float)args->decay;
    c.momentum = (float)args->momentum;
    c.rest = (float)(1 - args->dampening);
    c.lr = (float)args->lr;
    c.nesterov = args->nesterov;
    c.first = args->first;
    return run(args, plain ? kPlainSgd : kSgd, plain ? nullptr : args->exp_avg, nullptr, &c);
}

// ---------------------------------------------------------------------------------------------------------------------
// LAMB: the ratio of two norms stands between the moments and the step. Two walks over memory; the update is computed
// in both, from the moments as they are stored, so that no buffer as large as the param is needed.

namespace {

struct Lamb {
    const Kernels *kernels;
    const ds_lamb_args *args;
    LambConstants constants;
    float size;    // lr, bias correction and ratio
    double *sums;  // two a chunk: squares of the param and of the update

    // A tile of each buffer; where their dtypes differ, or a copy of the param is wanted, they pass through fp32.
    struct Tile {
        alignas(64) float p[kTile], m[kTile], v[kTile], g[kTile], update[kTile];
    };

    int64_t chunks() const { return (args->numel + kChunk - 1) / kChunk; }

    bool mixed() const {
        const ds_lamb_args &a = *args;
        return a.param_dtype != a.state_dtype || a.param_dtype != a.grad_dtype || a.low;
    }

    static char *place(const void *data, int32_t dtype, int64_t at) {
        return (char *)data + at * ds::bytes_of(dtype);
    }
    void widen(const void *data, int32_t dtype, int64_t at, int64_t n, float *to) const {
        ds::widen(kernels, place(data, dtype, at), dtype, to, n);
    }
    void narrow(const float *from, void *data, int32_t dtype, int64_t at, int64_t n) const {
        ds::narrow(kernels, from, place(data, dtype, at), dtype, n);
    }

    // Moments of a tile, and the squares of its param and of its update.
    void first_tile(Tile &t, int64_t at, int64_t n, double *ours, double *its) const {
        const ds_lamb_args &a = *args;
        if (!mixed()) {
            const int32_t d = a.param_dtype;
            kernels->lamb_first[d](place(a.param, d, at), place(a.exp_avg, d, at),
                                   place(a.exp_avg_sq, d, at), place(a.grad, d, at), n, &constants,
                                   ours, its);
            return;
        }
        widen(a.param, a.param_dtype, at, n, t.p);
        widen(a.exp_avg, a.state_dtype, at, n, t.m);
        widen(a.exp_avg_sq, a.state_dtype, at, n, t.v);
        widen(a.grad, a.grad_dtype, at, n, t.g);
        kernels->lamb_first[DS_F32](t.p, t.m, t.v, t.g, n, &constants, ours, its);
        narrow(t.m, a.exp_avg, a.state_dtype, at, n);
        narrow(t.v, a.exp_avg_sq, a.state_dtype, at, n);
        if (a.state_dtype == DS_F32) return;
        // The update again, of the moments as they are stored.
        widen(a.exp_avg, a.state_dtype, at, n, t.m);
        widen(a.exp_avg_sq, a.state_dtype, at, n, t.v);
        kernels->lamb_update(t.p, t.m, t.v, t.update, n, &constants);
        kernels->squares(t.update, n, its);
    }

    static void first(void *context, int64_t index) {
        const Lamb &l = *(const Lamb *)context;
        const int64_t begin = index * kChunk;
        const int64_t end = begin + kChunk < l.args->numel ? begin + kChunk : l.args->numel;
        double ours = 0, its = 0, params[kNormLanes], updates[kNormLanes];
        Tile t;
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = end - at < kTile ? end - at : (int64_t)kTile;
            l.first_tile(t, at, n, params, updates);
            ours += ds::fold(params);
            its += ds::fold(updates);
        }
        l.sums[2 * index] = ours;
        l.sums[2 * index + 1] = its;
    }

    void second_tile(Tile &t, int64_t at, int64_t n) const {
        const ds_lamb_args &a = *args;
        if (!mixed()) {
            const int32_t d = a.param_dtype;
            kernels->lamb_second[d](place(a.param, d, at), place(a.exp_avg, d, at),
                                    place(a.exp_avg_sq, d, at), n, &constants, size);
            return;
        }
        widen(a.param, a.param_dtype, at, n, t.p);
        widen(a.exp_avg, a.state_dtype, at, n, t.m);
        widen(a.exp_avg_sq, a.state_dtype, at, n, t.v);
        kernels->lamb_second[DS_F32](t.p, t.m, t.v, n, &constants, size);
        narrow(t.p, a.param, a.param_dtype, at, n);
        if (a.low) narrow(t.p, a.low, a.low_dtype, at, n);
    }

    // Each thread walks its part of the first walk back: what it saw last is still in the caches.
    static void second(void *context, int64_t index) {
        const Lamb &l = *(const Lamb *)context;
        const int64_t begin = ds::mirrored(index, l.chunks(), l.args->threads) * kChunk;
        const int64_t end = begin + kChunk < l.args->numel ? begin + kChunk : l.args->numel;
        Tile t;
        for (int64_t at = begin; at < end; at += kTile)
            l.second_tile(t, at, end - at < kTile ? end - at : (int64_t)kTile);
    }
};

double ratio_of(double ours, double its, double least, double most) {
    if (!(ours > 0 && its > 0)) return 1;
    const double found = sqrt(ours) / sqrt(its);
    return found < least ? least : found > most ? most : found;
}

}  // namespace

extern "C" int ds_lamb_step(const ds_lamb_args *args) {
    if (int status = ds::check_struct(args, "ds_lamb_step")) return status;
    if (int status = check(args, "ds_lamb_step", args->exp_avg, args->exp_avg_sq, 2)) return status;
    if (args->step < 1 || args->ratio == nullptr || (uintptr_t)args->ratio % sizeof(float))
        return ds::fail(DS_BAD_VALUE, "ds_lamb_step: step is %lld, the first is 1; or no ratio",
                        (long long)args->step);
    const double n = (double)args->step;
    Lamb lamb;
    lamb.kernels = ds::kernels();
    lamb.args = args;
    LambConstants &c = lamb.constants;
    c.grad_scale = (float)args->grad_scale;
    c.beta1_rest = (float)(1 - args->beta1);
    c.beta2 = (float)args->beta2;
    c.beta2_rest = (float)(1 - args->beta2);
    c.eps = (float)args->eps;
    c.decay = (float)args->decay;
    c.eps_inside = args->eps_inside;
    const int64_t chunks = lamb.chunks();
    lamb.sums = new (std::nothrow) double[(size_t)(2 * chunks) + 1];
    if (lamb.sums == nullptr)
        return ds::fail(DS_NO_MEMORY, "ds_lamb_step: no memory for %lld partial sums",
                        (long long)(2 * chunks));
    ds::parallel_for(Lamb::first, &lamb, chunks, args->threads);
    double ours = 0, its = 0;
    for (int64_t i = 0; i < chunks; ++i) {
        ours += lamb.sums[2 * i];
        its += lamb.sums[2 * i + 1];
    }
    delete[] lamb.sums;
    const float ratio = (float)ratio_of(ours, its, args->least, args->most);
    const double size = args->bias_correction ? args->lr * sqrt(1 - pow(args->beta2, n)) /
                                                    (1 - pow(args->beta1, n))
                                              : args->lr;
    lamb.size = (float)size * ratio;
    ds::parallel_for(Lamb::second, &lamb, chunks, args->threads);
    *(float *)args->ratio = ratio;
    return DS_OK;
}
