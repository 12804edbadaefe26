// SPDX-License-Identifier: Apache-2.0
// Every kernel, written once over Vec. Each isa_*.cpp includes its Vec and then this file.
//
// [Note: ISA units]
// These objects are compiled for instructions that the running CPU may lack. They include no header that defines
// functions (no <vector>, no <cmath>): an inline function that they emitted could be the copy that the linker keeps
// for everybody. All they define has internal linkage but the one table at the end, which needs no initialiser.
//
// [Note: same bits everywhere]
// Only +, -, *, / and square root are used, each rounded once, never contracted to a fused multiply-add (the build
// passes -ffp-contract=off). So each path gives the same bits as the scalar one, and so does each machine.
#include "kernels.h"

#if defined(_MSC_VER)
#pragma fp_contract(off)
#endif

namespace {

// Bytes between what is worked on and what is asked of memory. The processors' own prefetchers stop at the end of each
// 4 KiB page and have to start again for each of the streams; asking half a page ahead keeps them going.
enum { kAhead = 2048 };

inline void fetch(const void *p) { prefetch((const char *)p + kAhead); }

// Each kernel runs its body on whole vectors, then once on copies of the last elements, padded with zeros: one body
// for both cases, what it makes of the padding is thrown away.
struct AdamBody {
    const Vec scale, l2, keep, rest1, beta2, rest2, root2, eps, size;
    const bool l2_on, far;  // far: beta1 < 1/2, where lerp starts from the gradient (as torch's does)

    explicit AdamBody(const AdamConstants *c)
        : scale(Vec::all(c->grad_scale)),
          l2(Vec::all(c->l2)),
          keep(Vec::all(c->keep)),
          rest1(Vec::all(c->beta1_rest < 0.5f ? c->beta1_rest : c->beta1_rest - 1)),
          beta2(Vec::all(c->beta2)),
          rest2(Vec::all(c->beta2_rest)),
          root2(Vec::all(c->inv_root_bias2)),
          eps(Vec::all(c->eps)),
          size(Vec::all(c->step_size)),
          l2_on(c->l2 != 0),
          far(c->beta1_rest >= 0.5f) {}

    inline void run(float *param, float *exp_avg, float *exp_avg_sq, const float *grad) const {
        fetch(param);
        fetch(exp_avg);
        fetch(exp_avg_sq);
        fetch(grad);
        Vec p = Vec::load(param), m = Vec::load(exp_avg), v = Vec::load(exp_avg_sq);
        Vec g = Vec::load(grad) * scale;
        if (l2_on) g = g + p * l2;
        m = (far ? g : m) + rest1 * (g - m);      // first moment
        v = v * beta2 + rest2 * g * g;            // second moment
        const Vec spread = root(v) * root2 + eps;  // both with their bias corrected
        p = p * keep - size * m / spread;
        p.store(param);
        m.store(exp_avg);
        v.store(exp_avg_sq);
    }
};

void adam(float *param, float *exp_avg, float *exp_avg_sq, const float *grad, int64_t n,
          const AdamConstants *c) {
    const AdamBody body(c);
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width)
        body.run(param + i, exp_avg + i, exp_avg_sq + i, grad + i);
    if (i == n) return;
    float p[Vec::width] = {0}, m[Vec::width] = {0}, v[Vec::width] = {0}, g[Vec::width] = {0};
    const int64_t rest = n - i;
    for (int64_t k = 0; k < rest; ++k) {
        p[k] = param[i + k];
        m[k] = exp_avg[i + k];
        v[k] = exp_avg_sq[i + k];
        g[k] = grad[i + k];
    }
    body.run(p, m, v, g);
    for (int64_t k = 0; k < rest; ++k) {
        param[i + k] = p[k];
        exp_avg[i + k] = m[k];
        exp_avg_sq[i + k] = v[k];
    }
}

struct AdagradBody {
    const Vec scale, l2, eps, lr;
    const bool l2_on;

    explicit AdagradBody(const AdagradConstants *c)
        : scale(Vec::all(c->grad_scale)),
          l2(Vec::all(c->l2)),
          eps(Vec::all(c->eps)),
          lr(Vec::all(c->lr)),
          l2_on(c->l2 != 0) {}

    inline void run(float *param, float *exp_avg_sq, const float *grad) const {
        fetch(param);
        fetch(exp_avg_sq);
        fetch(grad);
        Vec p = Vec::load(param), v = Vec::load(exp_avg_sq);
        Vec g = Vec::load(grad) * scale;
        if (l2_on) g = g + p * l2;
        v = v + g * g;  // sum of squares
        p = p - lr * g / (root(v) + eps);
        p.store(param);
        v.store(exp_avg_sq);
    }
};

void adagrad(float *param, float *exp_avg_sq, const float *grad, int64_t n,
             const AdagradConstants *c) {
    const AdagradBody body(c);
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) body.run(param + i, exp_avg_sq + i, grad + i);
    if (i == n) return;
    float p[Vec::width] = {0}, v[Vec::width] = {0}, g[Vec::width] = {0};
    const int64_t rest = n - i;
    for (int64_t k = 0; k < rest; ++k) {
        p[k] = param[i + k];
        v[k] = exp_avg_sq[i + k];
        g[k] = grad[i + k];
    }
    body.run(p, v, g);
    for (int64_t k = 0; k < rest; ++k) {
        param[i + k] = p[k];
        exp_avg_sq[i + k] = v[k];
    }
}

struct LionBody {
    const Vec scale, keep, rest1, rest2, lr;
    const bool far1, far2;

    explicit LionBody(const LionConstants *c)
        : scale(Vec::all(c->grad_scale)),
          keep(Vec::all(c->keep)),
          rest1(Vec::all(c->beta1_rest < 0.5f ? c->beta1_rest : c->beta1_rest - 1)),
          rest2(Vec::all(c->beta2_rest < 0.5f ? c->beta2_rest : c->beta2_rest - 1)),
          lr(Vec::all(c->lr)),
          far1(c->beta1_rest >= 0.5f),
          far2(c->beta2_rest >= 0.5f) {}

    inline void run(float *param, float *exp_avg, const float *grad) const {
        fetch(param);
        fetch(exp_avg);
        fetch(grad);
        Vec p = Vec::load(param), m = Vec::load(exp_avg);
        const Vec g = Vec::load(grad) * scale;
        const Vec direction = sign((far1 ? g : m) + rest1 * (g - m));
        p = p * keep - lr * direction;
        m = (far2 ? g : m) + rest2 * (g - m);  // momentum
        p.store(param);
        m.store(exp_avg);
    }
};

void lion(float *param, float *exp_avg, const float *grad, int64_t n, const LionConstants *c) {
    const LionBody body(c);
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) body.run(param + i, exp_avg + i, grad + i);
    if (i == n) return;
    float p[Vec::width] = {0}, m[Vec::width] = {0}, g[Vec::width] = {0};
    const int64_t rest = n - i;
    for (int64_t k = 0; k < rest; ++k) {
        p[k] = param[i + k];
        m[k] = exp_avg[i + k];
        g[k] = grad[i + k];
    }
    body.run(p, m, g);
    for (int64_t k = 0; k < rest; ++k) {
        param[i + k] = p[k];
        exp_avg[i + k] = m[k];
    }
}

void squares(const float *x, int64_t n, double *lanes) {
    Squares sums = Squares::zero();
    int64_t i = 0;
    for (; i + kNormLanes <= n; i += kNormLanes) sums.add(x + i);
    if (i < n) {
        float last[kNormLanes] = {0};
        for (int64_t k = 0; i + k < n; ++k) last[k] = x[i + k];
        sums.add(last);
    }
    sums.store(lanes);
}

void squares_f64(const double *x, int64_t n, double *lanes) {
    for (int k = 0; k < kNormLanes; ++k) lanes[k] = 0;
    int64_t i = 0;
    for (; i + kNormLanes <= n; i += kNormLanes)
        for (int k = 0; k < kNormLanes; ++k) lanes[k] += x[i + k] * x[i + k];
    for (int k = 0; i + k < n; ++k) lanes[k] += x[i + k] * x[i + k];
}

// Applies one conversion to n elements; the last ones pass through padded copies.
#define DS_CONVERSION(NAME, IN, OUT, ONE)                                   \
    void NAME(const IN *in, OUT *out, int64_t n) {                          \
        int64_t i = 0;                                                      \
        for (; i + Vec::width <= n; i += Vec::width) ONE(in + i, out + i);  \
        if (i == n) return;                                                 \
        IN last_in[Vec::width] = {0};                                       \
        OUT last_out[Vec::width];                                           \
        for (int64_t k = 0; i + k < n; ++k) last_in[k] = in[i + k];         \
        ONE(last_in, last_out);                                             \
        for (int64_t k = 0; i + k < n; ++k) out[i + k] = last_out[k];       \
    }

inline void one_from_bf16(const uint16_t *in, float *out) {
    fetch(in);
    widen_bf16(in).store(out);
}
inline void one_from_f16(const uint16_t *in, float *out) {
    fetch(in);
    widen_f16(in).store(out);
}
inline void one_to_bf16(const float *in, uint16_t *out) { narrow_bf16(Vec::load(in), out); }
inline void one_to_f16(const float *in, uint16_t *out) { narrow_f16(Vec::load(in), out); }

DS_CONVERSION(from_bf16, uint16_t, float, one_from_bf16)
DS_CONVERSION(from_f16, uint16_t, float, one_from_f16)
DS_CONVERSION(to_bf16, float, uint16_t, one_to_bf16)
DS_CONVERSION(to_f16, float, uint16_t, one_to_f16)

#undef DS_CONVERSION

}  // namespace

#define DS_KERNELS(NAME)                                                                       \
    extern "C" const Kernels ds_kernels_##NAME = {#NAME,       adam,      adagrad,  lion,       \
                                                  squares,     squares_f64, from_bf16, from_f16, \
                                                  to_bf16,     to_f16};
