// SPDX-License-Identifier: Apache-2.0
// LAMB over many tensors in three launches: moments and partial norms, one ratio a tensor, the step.
//
// The update is computed twice from the stored moments instead of being stored between: both launches then see the
// same numbers, and no buffer as large as the params is needed. Sums are made in one fixed order.
#include "optim_rules.cuh"
#include "table.cuh"

DS_KERNEL lamb_moments(const i64 *table, i32 tensors, i32 chunk, const i32 *noop, const float *factor,
                       double *partial, float scale, float beta1_rest, float beta2, float beta2_rest,
                       float eps, float decay, i32 eps_inside) {
    if (noop && *noop) return;
    if (factor) scale *= *factor;
    const Lamb rule = {beta1_rest, beta2, beta2_rest, eps, decay, eps_inside};
    const Part t = part_of_block(table, tensors, chunk);
    double ours = 0, its = 0;
    for (i64 i = t.begin + threadIdx.x; i < t.end; i += kThreads) {
        const float p = load(t.at[0], t.code[0], i);
        float m = load(t.at[1], t.code[1], i), v = load(t.at[2], t.code[2], i);
        Lamb::moments(rule, m, v, load(t.at[3], t.code[3], i) * scale);
        store(t.at[1], t.code[1], i, m);
        store(t.at[2], t.code[2], i, v);
        // what the last launch will read: the moments as stored
        m = load(t.at[1], t.code[1], i), v = load(t.at[2], t.code[2], i);
        const float update = Lamb::update(rule, p, m, v);
        ours += (double)p * p;
        its += (double)update * update;
    }
    ours = reduce_block<Add>(ours);
    its = reduce_block<Add>(its);
    if (threadIdx.x == 0) {
        partial[2 * (i64)blockIdx.x] = ours;
        partial[2 * (i64)blockIdx.x + 1] = its;
    }
}

// One block a tensor: the ratio of its norms within [least, most], 1 where a norm is 0.
DS_KERNEL lamb_ratio(const i64 *table, i32 tensors, i64 blocks, const i32 *noop,
                     const double *partial, float *ratio, float least, float most) {
    if (noop && *noop) return;
    const i64 row = blockIdx.x;
    const i64 end = row + 1 < tensors ? table[(row + 1) * kColumns] : blocks;
    double ours = 0, its = 0;
    for (i64 i = table[row * kColumns] + threadIdx.x; i < end; i += kThreads) {
        ours += partial[2 * i];
        its += partial[2 * i + 1];
    }
    ours = reduce_block<Add>(ours);
    its = reduce_block<Add>(its);
    if (threadIdx.x == 0) {
        const float found = (float)(sqrt(ours) / sqrt(its));
        const float bounded = found < least ? least : found > most ? most : found;
        ratio[row] = ours > 0 && its > 0 ? bounded : 1.0f;
    }
}

DS_KERNEL lamb_apply(const i64 *table, i32 tensors, i32 chunk, const i32 *noop, const float *ratio,
                     float step_size, float eps, float decay, i32 eps_inside) {
    if (noop && *noop) return;
    const Lamb rule = {0, 0, 0, eps, decay, eps_inside};
    const Part t = part_of_block(table, tensors, chunk);
    const float size = step_size * ratio[t.row];
    for (i64 i = t.begin + threadIdx.x; i < t.end; i += kThreads) {
        float p = load(t.at[0], t.code[0], i);
        const float m = load(t.at[1], t.code[1], i), v = load(t.at[2], t.code[2], i);
        p -= Lamb::update(rule, p, m, v) * size;
        store(t.at[0], t.code[0], i, p);
        if (t.at[4]) store(t.at[4], t.code[4], i, p);
    }
}
