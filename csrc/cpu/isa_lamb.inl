// SPDX-License-Identifier: Apache-2.0
// The kernels of LAMB, over tiles in the first-level cache, written once over Vec. Part of isa_unit.inl.

namespace {

// The parts of a step between which the norms are found.
struct LambRule {
    const Vec scale, beta2, rest2, eps, decay;
    const Lerp toward;
    const bool inside;

    explicit LambRule(const LambConstants &c)
        : scale(Vec::all(c.grad_scale)),
          beta2(Vec::all(c.beta2)),
          rest2(Vec::all(c.beta2_rest)),
          eps(Vec::all(c.eps)),
          decay(Vec::all(c.decay)),
          toward(c.beta1_rest),
          inside(c.eps_inside != 0) {}

    inline void moments(Vec &m, Vec &v, Vec g) const {
        g = g * scale;
        m = toward(m, g);
        v = v * beta2 + rest2 * g * g;
    }
    // The update before it is scaled to the param's norm.
    inline Vec update(Vec p, Vec m, Vec v) const { return update_by(p, m, spread(v)); }
    inline Vec spread(Vec v) const { return inside ? root(v + eps) : root(v) + eps; }
    inline Vec update_by(Vec p, Vec m, Vec spread) const { return m / spread + decay * p; }
};

// [Note: short chains]
// From a moment to the update is a long way: the processor would wait for its end with few other numbers under way. So a
// run of numbers takes one part of it at a time; what is between two parts stays in the first-level cache. Only bf16 has
// so much to do that this pays, in short vectors most; else the run is a block. What memory is asked for is spread over
// the parts.
enum { kRun = 16 * kBlock, kPair = 2 * Vec::width };
template <class P>
inline int64_t run_of() {
    return !P::is_bf16 ? kBlock : Vec::width < 16 ? kRun : kRun / 4;
}

template <class P>
inline void spread_pair(const LambRule &rule, Vec &v, Vec &u) {
    if (P::is_bf16 && !rule.inside && roots_of_bf16(v, u)) {
        v = v + rule.eps;
        u = u + rule.eps;
    } else {
        v = rule.spread(v);
        u = rule.spread(u);
    }
}

// Whole blocks of buffers that all have one dtype. The update is made of the moments as they are stored; pairs may be
// split.
template <class P>
inline void lamb_first_run(const LambRule &rule, const typename P::Kept *param,
                           typename P::Kept *first, typename P::Kept *second,
                           const typename P::Kept *grad, int64_t n, float *wide, float *update) {
    float spread[kRun];
    for (int64_t k = 0; k < n; k += kPair) {
        if (k % kBlock == 0) fetch_block(first + k);
        if (k % kBlock == 0) fetch_block(grad + k);
        Vec m, l, v, u, g, h;
        P::load_split(first + k, m, l);
        P::load_split(second + k, v, u);
        P::load_split(grad + k, g, h);
        rule.moments(m, v, g);
        rule.moments(l, u, h);
        P::keep_split(m, l, first + k);
        P::keep_split(v, u, second + k);
        F32::store_pair(m, l, update + k);
        F32::store_pair(v, u, spread + k);
    }
    for (int64_t k = 0; k < n; k += kPair) {
        if (k % kBlock == 0) fetch_block(second + k);
        Vec v, u;
        F32::load_pair(spread + k, v, u);
        spread_pair<P>(rule, v, u);
        F32::store_pair(v, u, spread + k);
    }
    for (int64_t k = 0; k < n; k += kPair) {
        if (k % kBlock == 0) fetch_block(param + k);
        Vec p, q, m, l, v, u;
        P::load_split(param + k, p, q);
        F32::load_pair(update + k, m, l);
        F32::load_pair(spread + k, v, u);
        F32::store_pair(p, q, wide + k);
        F32::store_pair(rule.update_by(p, m, v), rule.update_by(q, l, u), update + k);
    }
}

template <class P>
inline void lamb_second_run(const LambRule &rule, Vec size, typename P::Kept *param,
                            const typename P::Kept *first, const typename P::Kept *second,
                            int64_t n) {
    float spread[kRun];
    for (int64_t k = 0; k < n; k += kPair) {
        if (k % kBlock == 0) fetch_block(second + k);
        Vec v, u;
        P::load_split(second + k, v, u);
        spread_pair<P>(rule, v, u);
        F32::store_pair(v, u, spread + k);
    }
    for (int64_t k = 0; k < n; k += kPair) {
        if (k % kBlock == 0) fetch_block(param + k);
        if (k % kBlock == 0) fetch_block(first + k);
        Vec p, q, m, l, v, u;
        P::load_split(param + k, p, q);
        P::load_split(first + k, m, l);
        F32::load_pair(spread + k, v, u);
        P::store_split(p - rule.update_by(p, m, v) * size, q - rule.update_by(q, l, u) * size,
                       param + k);
    }
}

// Moments, and the squares of the param and of the update, see Kernels::squares.
template <class P>
void lamb_first(const void *param, void *first, void *second, const void *grad, int64_t n,
                const LambConstants *c, double *ours, double *its) {
    typedef typename P::Kept Kept;
    const LambRule rule(*c);
    const Kept *p = (const Kept *)param, *g = (const Kept *)grad;
    Kept *m = (Kept *)first, *v = (Kept *)second;
    float wide[kRun], update[kRun];
    Squares params = Squares::zero(), updates = Squares::zero();
    const auto add = [&](int64_t some) {
        for (int64_t k = 0; k < some; k += kBlock) params.add(wide + k);
        for (int64_t k = 0; k < some; k += kBlock) updates.add(update + k);
    };
    const int64_t whole = n - n % kBlock;
    const int64_t run = run_of<P>();
    for (int64_t i = 0; i < whole; i += run) {
        const int64_t some = whole - i < run ? whole - i : run;
        lamb_first_run<P>(rule, p + i, m + i, v + i, g + i, some, wide, update);
        add(some);
    }
    if (whole < n) {
        Kept last_p[kBlock] = {0}, last_m[kBlock] = {0}, last_v[kBlock] = {0}, last_g[kBlock] = {0};
        copy_some(p + whole, last_p, n - whole);
        copy_some(m + whole, last_m, n - whole);
        copy_some(v + whole, last_v, n - whole);
        copy_some(g + whole, last_g, n - whole);
        lamb_first_run<P>(rule, last_p, last_m, last_v, last_g, kBlock, wide, update);
        P::clear_split(update, (int)(n - whole), kBlock);  // 0 / 0
        add(kBlock);
        copy_some(last_m, m + whole, n - whole);
        copy_some(last_v, v + whole, n - whole);
    }
    params.store(ours);
    updates.store(its);
    P::join_split(ours);
    P::join_split(its);
}

// The update alone, of floats.
void lamb_update(const float *param, const float *first, const float *second, float *update,
                 int64_t n, const LambConstants *c) {
    const LambRule rule(*c);
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width)
        rule.update(Vec::load(param + i), Vec::load(first + i), Vec::load(second + i))
            .store(update + i);
    if (i == n) return;
    float p[Vec::width] = {0}, m[Vec::width] = {0}, v[Vec::width] = {0}, u[Vec::width];
    copy_some(param + i, p, n - i);
    copy_some(first + i, m, n - i);
    copy_some(second + i, v, n - i);
    rule.update(Vec::load(p), Vec::load(m), Vec::load(v)).store(u);
    copy_some(u, update + i, n - i);
}

// param - update * size
template <class P>
void lamb_second(void *param, const void *first, const void *second, int64_t n,
                 const LambConstants *c, float size) {
    typedef typename P::Kept Kept;
    const LambRule rule(*c);
    const Vec by = Vec::all(size);
    Kept *p = (Kept *)param;
    const Kept *m = (const Kept *)first, *v = (const Kept *)second;
    const int64_t whole = n - n % kBlock;
    const int64_t run = run_of<P>();
    for (int64_t i = 0; i < whole; i += run) {
        const int64_t some = whole - i < run ? whole - i : run;
        lamb_second_run<P>(rule, by, p + i, m + i, v + i, some);
    }
    if (whole == n) return;
    Kept last_p[kBlock] = {0}, last_m[kBlock] = {0}, last_v[kBlock] = {0};
    copy_some(p + whole, last_p, n - whole);
    copy_some(m + whole, last_m, n - whole);
    copy_some(v + whole, last_v, n - whole);
    lamb_second_run<P>(rule, by, last_p, last_m, last_v, kBlock);
    copy_some(last_p, p + whole, n - whole);
}

}  // namespace
