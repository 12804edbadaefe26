// SPDX-License-Identifier: Apache-2.0
// The optimizer entries: check the arguments, cut the buffers into chunks for the threads and tiles for the cache.
//
// The kernels read and write any mix of dtypes. Only where a copy of the new param is wanted beside it (`low`), the
// param passes through fp32 tiles that stay in the first-level cache until the copy is made.
#include <math.h>
#include <string.h>

#include "../api/ds_api.h"
#include "../api/error.h"
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

inline int64_t bytes_of(int32_t dtype) { return dtype == DS_F32 ? 4 : 2; }

inline char *place(const Buffer &buffer, int64_t at) {
    return buffer.data == nullptr ? nullptr : buffer.data + at * bytes_of(buffer.dtype);
}

void widen(const Kernels *k, const char *home, int32_t dtype, float *to, int64_t n) {
    (dtype == DS_BF16 ? k->from_bf16 : k->from_f16)((const uint16_t *)home, to, n);
}

void narrow(const Kernels *k, const float *from, char *home, int32_t dtype, int64_t n) {
    if (dtype == DS_F32)
        memcpy(home, from, n * sizeof(float));
    else
        (dtype == DS_BF16 ? k->to_bf16 : k->to_f16)(from, (uint16_t *)home, n);
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
            widen(kernels, home, param.dtype, scratch, n);
            p = (char *)scratch;
        }
        sweep(p, place(first, at), place(second, at), place(grad, at), n, constants);
        if (through) narrow(kernels, scratch, home, param.dtype, n);
        if (low.data != nullptr) narrow(kernels, (float *)p, place(low, at), low.dtype, n);
    }
};

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

template <class Args>
int run(const Args *args, int rule, void *first, void *second, const void *constants) {
    const bool whole = args->param != nullptr && args->grad != nullptr && first != nullptr &&
                       (second != nullptr || rule != kAdam);
    if (args->numel > 0 && !whole) return ds::fail(DS_BAD_VALUE, "a buffer of the step is null");
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

}  // namespace

extern "C" int ds_adam_step(const ds_adam_args *args) {
    if (int status = check(args, "ds_adam_step")) return status;
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
    return run(args, kAdam, args->exp_avg, args->exp_avg_sq, &c);
}

extern "C" int ds_adagrad_step(const ds_adagrad_args *args) {
    if (int status = check(args, "ds_adagrad_step")) return status;
    AdagradConstants c;
    c.grad_scale = (float)args->grad_scale;
    c.l2 = (float)args->decay;
    c.eps = (float)args->eps;
    c.lr = (float)args->lr;
    return run(args, kAdagrad, args->exp_avg_sq, nullptr, &c);
}

extern "C" int ds_lion_step(const ds_lion_args *args) {
    if (int status = check(args, "ds_lion_step")) return status;
    LionConstants c;
    c.grad_scale = (float)args->grad_scale;
    c.keep = (float)(1 - args->lr * args->decay);
    c.beta1_rest = (float)(1 - args->beta1);
    c.beta2_rest = (float)(1 - args->beta2);
    c.lr = (float)args->lr;
    return run(args, kLion, args->exp_avg, nullptr, &c);
}
