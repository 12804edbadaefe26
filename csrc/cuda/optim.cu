// SPDX-License-Identifier: Apache-2.0
// Adam, Adagrad and Lion over many tensors in one launch; unscaling, clipping and the low copy ride along.
//
// `noop` (may be null) makes the launch do nothing when it points to a number other than 0; `factor` (may be null)
// points to a device float that the gradient is multiplied by besides `scale`. So neither the overflow check nor the
// clip coefficient has to visit the host.
#include "optim_rules.cuh"
#include "table.cuh"

template <class Rule>
DS_FN void sweep_by4(const Part &t, const Rule &rule, float scale) {
    for (i64 i = t.begin + threadIdx.x * 4; i + 4 <= t.end; i += kThreads * 4) {
        float p[4], a[4], b[4], g[4];
        // all loads first, then the conversions that wait for them
        const Words4 raw_p = fetch4(t.at[0], t.code[0], i), raw_a = fetch4(t.at[1], t.code[1], i);
        const Words4 raw_b = Rule::kMoments == 2 ? fetch4(t.at[2], t.code[2], i) : Words4{0, 0, 0, 0};
        const Words4 raw_g = fetch4(t.at[3], t.code[3], i);
        unpack4(raw_p, t.code[0], p);
        unpack4(raw_a, t.code[1], a);
        unpack4(raw_b, t.code[2], b);
        unpack4(raw_g, t.code[3], g);
        for (i32 k = 0; k < 4; ++k) Rule::step(rule, p[k], a[k], b[k], g[k] * scale);
        store4(t.at[0], t.code[0], i, p);
        store4(t.at[1], t.code[1], i, a);
        if (Rule::kMoments == 2) store4(t.at[2], t.code[2], i, b);
        if (t.at[4]) store4(t.at[4], t.code[4], i, p);
    }
}

template <class Rule>
DS_FN void sweep_by1(const Part &t, const Rule &rule, float scale, i64 from) {
    for (i64 i = from + threadIdx.x; i < t.end; i += kThreads) {
        float p = load(t.at[0], t.code[0], i), a = load(t.at[1], t.code[1], i);
        float b = Rule::kMoments == 2 ? load(t.at[2], t.code[2], i) : 0;
        Rule::step(rule, p, a, b, load(t.at[3], t.code[3], i) * scale);
        store(t.at[0], t.code[0], i, p);
        store(t.at[1], t.code[1], i, a);
        if (Rule::kMoments == 2) store(t.at[2], t.code[2], i, b);
        if (t.at[4]) store(t.at[4], t.code[4], i, p);
    }
}

template <class Rule>
DS_FN void sweep(const i64 *table, i32 tensors, i32 chunk, const i32 *noop, const float *factor,
                 float scale, const Rule &rule) {
    if (noop && *noop) return;
    if (factor) scale *= *factor;
    const Part part = part_of_block(table, tensors, chunk);
    if (part.by4) {
        sweep_by4(part, rule, scale);
        sweep_by1(part, rule, scale, part.end - (part.end - part.begin) % 4);
    } else {
        sweep_by1(part, rule, scale, part.begin);
    }
}

DS_KERNEL adam_step(const i64 *table, i32 tensors, i32 chunk, const i32 *noop, const float *factor,
                    float scale, float l2, float keep, float beta1_rest, float beta2,
                    float beta2_rest, float root_bias2, float eps, float step_size) {
    const Adam rule = {l2, keep, beta1_rest, beta2, beta2_rest, root_bias2, eps, step_size};
    sweep(table, tensors, chunk, noop, factor, scale, rule);
}

DS_KERNEL adagrad_step(const i64 *table, i32 tensors, i32 chunk, const i32 *noop, const float *factor,
                       float scale, float l2, float eps, float lr) {
    const Adagrad rule = {l2, eps, lr};
    sweep(table, tensors, chunk, noop, factor, scale, rule);
}

DS_KERNEL lion_step(const i64 *table, i32 tensors, i32 chunk, const i32 *noop, const float *factor,
                    float scale, float keep, float beta1_rest, float beta2_rest, float lr) {
    const Lion rule = {keep, beta1_rest, beta2_rest, lr};
    sweep(table, tensors, chunk, noop, factor, scale, rule);
}
