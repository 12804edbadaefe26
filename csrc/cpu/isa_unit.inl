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

// How an element is kept in memory. The arithmetic is fp32 whatever it is.
struct F32 {
    typedef float Kept;
    static inline Vec load(const float *p) { return Vec::load(p); }
    static inline void store(Vec a, float *p) { a.store(p); }
};
struct Bf16 {
    typedef uint16_t Kept;
    static inline Vec load(const uint16_t *p) { return widen_bf16(p); }
    static inline void store(Vec a, uint16_t *p) { narrow_bf16(a, p); }
};
struct F16 {
    typedef uint16_t Kept;
    static inline Vec load(const uint16_t *p) { return widen_f16(p); }
    static inline void store(Vec a, uint16_t *p) { narrow_f16(a, p); }
};

// a + weight * (b - a), as torch's lerp: from the nearer end.
struct Lerp {
    const Vec weight;
    const bool far;

    explicit Lerp(float w) : weight(Vec::all(w < 0.5f ? w : w - 1)), far(w >= 0.5f) {}
    inline Vec operator()(Vec a, Vec b) const { return (far ? b : a) + weight * (b - a); }
};

struct Adam {
    typedef AdamConstants Constants;
    enum { moments = 2 };
    const Vec scale, l2, keep, beta2, rest2, root2, eps, size;
    const Lerp toward;
    const bool l2_on;

    explicit Adam(const Constants &c)
        : scale(Vec::all(c.grad_scale)),
          l2(Vec::all(c.l2)),
          keep(Vec::all(c.keep)),
          beta2(Vec::all(c.beta2)),
          rest2(Vec::all(c.beta2_rest)),
          root2(Vec::all(c.inv_root_bias2)),
          eps(Vec::all(c.eps)),
          size(Vec::all(c.step_size)),
          toward(c.beta1_rest),
          l2_on(c.l2 != 0) {}

    inline void operator()(Vec &p, Vec &m, Vec &v, Vec g) const {
        g = g * scale;
        if (l2_on) g = g + p * l2;
        m = toward(m, g);                          // first moment
        v = v * beta2 + rest2 * g * g;             // second moment
        const Vec spread = root(v) * root2 + eps;  // its root with the bias corrected
        p = p * keep - size * m / spread;
    }
};

struct Adagrad {
    typedef AdagradConstants Constants;
    enum { moments = 1 };
    const Vec scale, l2, eps, lr;
    const bool l2_on;

    explicit Adagrad(const Constants &c)
        : scale(Vec::all(c.grad_scale)),
          l2(Vec::all(c.l2)),
          eps(Vec::all(c.eps)),
          lr(Vec::all(c.lr)),
          l2_on(c.l2 != 0) {}

    inline void operator()(Vec &p, Vec &v, Vec &, Vec g) const {
        g = g * scale;
        if (l2_on) g = g + p * l2;
        v = v + g * g;  // sum of squares
        p = p - lr * g / (root(v) + eps);
    }
};

struct Lion {
    typedef LionConstants Constants;
    enum { moments = 1 };
    const Vec scale, keep, lr;
    const Lerp direction, toward;

    explicit Lion(const Constants &c)
        : scale(Vec::all(c.grad_scale)),
          keep(Vec::all(c.keep)),
          lr(Vec::all(c.lr)),
          direction(c.beta1_rest),
          toward(c.beta2_rest) {}

    inline void operator()(Vec &p, Vec &m, Vec &, Vec g) const {
        g = g * scale;
        p = p * keep - lr * sign(direction(m, g));
        m = toward(m, g);  // momentum
    }
};

// One whole vector of each buffer through the rule.
template <class Rule, class P, class S, class G>
inline void apply(const Rule &rule, typename P::Kept *param, typename S::Kept *first,
                  typename S::Kept *second, const typename G::Kept *grad) {
    Vec p = P::load(param), m = S::load(first), v = m;
    if (Rule::moments == 2) v = S::load(second);
    rule(p, m, v, G::load(grad));
    P::store(p, param);
    S::store(m, first);
    if (Rule::moments == 2) S::store(v, second);
}

// All whole vectors, then the last elements through copies that are padded with zeros: one body for both, what it
// makes of the padding is thrown away.
template <class Rule, class P, class S, class G>
void sweep(void *param, void *first, void *second, const void *grad, int64_t n,
           const void *constants) {
    const Rule rule(*(const typename Rule::Constants *)constants);
    typename P::Kept *p = (typename P::Kept *)param, last_p[Vec::width] = {0};
    typename S::Kept *m = (typename S::Kept *)first, last_m[Vec::width] = {0};
    typename S::Kept *v = (typename S::Kept *)second, last_v[Vec::width] = {0};
    const typename G::Kept *g = (const typename G::Kept *)grad;
    typename G::Kept last_g[Vec::width] = {0};
    const bool two = Rule::moments == 2;
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) {
        fetch(p + i);
        fetch(m + i);
        if (two) fetch(v + i);
        fetch(g + i);
        apply<Rule, P, S, G>(rule, p + i, m + i, two ? v + i : m, g + i);
    }
    if (i == n) return;
    for (int64_t k = 0; i + k < n; ++k) {
        last_p[k] = p[i + k];
        last_m[k] = m[i + k];
        if (two) last_v[k] = v[i + k];
        last_g[k] = g[i + k];
    }
    apply<Rule, P, S, G>(rule, last_p, last_m, last_v, last_g);
    for (int64_t k = 0; i + k < n; ++k) {
        p[i + k] = last_p[k];
        m[i + k] = last_m[k];
        if (two) v[i + k] = last_v[k];
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

#define DS_BY_GRAD(R, P, S) {sweep<R, P, S, F32>, sweep<R, P, S, Bf16>, sweep<R, P, S, F16>}
#define DS_BY_STATE(R, P) {DS_BY_GRAD(R, P, F32), DS_BY_GRAD(R, P, Bf16), DS_BY_GRAD(R, P, F16)}
#define DS_BY_PARAM(R) {DS_BY_STATE(R, F32), DS_BY_STATE(R, Bf16), DS_BY_STATE(R, F16)}
#define DS_KERNELS(NAME)                                            \
    extern "C" const Kernels ds_kernels_##NAME = {                  \
        #NAME,                                                      \
        {DS_BY_PARAM(Adam), DS_BY_PARAM(Adagrad), DS_BY_PARAM(Lion)}, \
        squares,                                                    \
        squares_f64,                                                \
        from_bf16,                                                  \
        from_f16,                                                   \
        to_bf16,                                                    \
        to_f16};
