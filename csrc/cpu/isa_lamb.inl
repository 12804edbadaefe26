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
    inline Vec update(Vec p, Vec m, Vec v) const {
        const Vec spread = inside ? root(v + eps) : root(v) + eps;
        return m / spread + decay * p;
    }
};

// Two vectors of buffers that all have one dtype. The update is made of the moments as they are stored.
template <class P>
inline void lamb_first_pair(const LambRule &rule, const typename P::Kept *param,
                            typename P::Kept *first, typename P::Kept *second,
                            const typename P::Kept *grad, float *wide, float *update) {
    Vec p, q, m, n, v, u, g, h;
    P::load_pair(first, m, n);
    P::load_pair(second, v, u);
    P::load_pair(grad, g, h);
    rule.moments(m, v, g);
    rule.moments(n, u, h);
    P::keep_pair(m, n, first);
    P::keep_pair(v, u, second);
    P::load_pair(param, p, q);
    F32::store_pair(p, q, wide);
    F32::store_pair(rule.update(p, m, v), rule.update(q, n, u), update);
}

template <class P>
inline void lamb_second_pair(const LambRule &rule, Vec size, typename P::Kept *param,
                             const typename P::Kept *first, const typename P::Kept *second) {
    Vec p, q, m, n, v, u;
    P::load_pair(param, p, q);
    P::load_pair(first, m, n);
    P::load_pair(second, v, u);
    P::store_pair(p - rule.update(p, m, v) * size, q - rule.update(q, n, u) * size, param);
}

// Moments, and the param and the update as floats.
template <class P>
void lamb_first(const void *param, void *first, void *second, const void *grad, int64_t n,
                const LambConstants *c, float *wide, float *update) {
    enum { w = 2 * Vec::width };
    typedef typename P::Kept Kept;
    const LambRule rule(*c);
    const Kept *p = (const Kept *)param, *g = (const Kept *)grad;
    Kept *m = (Kept *)first, *v = (Kept *)second;
    int64_t i = 0;
    for (; i + w <= n; i += w) {
        if (i % kBlock == 0) {
            fetch_block(p + i);
            fetch_block(m + i);
            fetch_block(v + i);
            fetch_block(g + i);
        }
        lamb_first_pair<P>(rule, p + i, m + i, v + i, g + i, wide + i, update + i);
    }
    if (i == n) return;
    Kept last_p[w] = {0}, last_m[w] = {0}, last_v[w] = {0}, last_g[w] = {0};
    float last_wide[w], last_update[w];
    copy_some(p + i, last_p, n - i);
    copy_some(m + i, last_m, n - i);
    copy_some(v + i, last_v, n - i);
    copy_some(g + i, last_g, n - i);
    lamb_first_pair<P>(rule, last_p, last_m, last_v, last_g, last_wide, last_update);
    copy_some(last_m, m + i, n - i);
    copy_some(last_v, v + i, n - i);
    copy_some(last_wide, wide + i, n - i);
    copy_some(last_update, update + i, n - i);
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
    enum { w = 2 * Vec::width };
    typedef typename P::Kept Kept;
    const LambRule rule(*c);
    const Vec by = Vec::all(size);
    Kept *p = (Kept *)param;
    const Kept *m = (const Kept *)first, *v = (const Kept *)second;
    int64_t i = 0;
    for (; i + w <= n; i += w) {
        if (i % kBlock == 0) {
            fetch_block(p + i);
            fetch_block(m + i);
            fetch_block(v + i);
        }
        lamb_second_pair<P>(rule, by, p + i, m + i, v + i);
    }
    if (i == n) return;
    Kept last_p[w] = {0}, last_m[w] = {0}, last_v[w] = {0};
    copy_some(p + i, last_p, n - i);
    copy_some(m + i, last_m, n - i);
    copy_some(v + i, last_v, n - i);
    lamb_second_pair<P>(rule, by, last_p, last_m, last_v);
    copy_some(last_p, p + i, n - i);
}

}  // namespace
