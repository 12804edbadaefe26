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
// passes -ffp-contract=off) but by name where that leaves the result what it is (exact_sum, Divisor). So each path gives
// the same bits as the scalar one, and so does each machine.
#include "kernels.h"

#if defined(_MSC_VER)
#pragma fp_contract(off)
#endif

namespace {

// Elements between two looks at what to prefetch: whole cache lines of any dtype.
enum { kBlock = 32, kLine = 64 };

// Bytes between what is worked on and what is asked of memory. The processors' own prefetchers stop at the end of each
// 4 KiB page and have to start again for each of the streams; asking half a page ahead keeps them going.
// A kernel that reads one stream alone asks for as much of it as others do for four together.
enum { kAhead = 2048, kAloneAhead = 4 * kAhead };

// Once for each line of a block.
template <class Kept>
inline void fetch_block(const Kept *p, int ahead = kAhead) {
    for (int byte = 0; byte < kBlock * (int)sizeof(Kept); byte += kLine)
        prefetch((const char *)p + ahead + byte);
}
// n elements from the i-th of p on.
template <class Kept>
inline void fetch_alone(const Kept *p, int64_t i, int64_t n) {
    for (int64_t k = (i + kBlock - 1) / kBlock * kBlock; k < i + n; k += kBlock)
        fetch_block(p + k, kAloneAhead);
}

// Leaves the sizes; returns the signs, as 16 bits each.
inline Halves part_signs(Vec &a, Vec &b) {
    const Halves signs = sign_halves(bits(a), bits(b));
    a = floats(bits(a) & Ints::all(0x7fffffff));
    b = floats(bits(b) & Ints::all(0x7fffffff));
    return signs;
}

// Of pairs that may be split (see vec_avx2.h): floats are set to zero from one element to another, and the lanes of kernels
// that add up such floats are put in order.
struct Together {
    static inline void clear_split(float *x, int from, int to) {
        for (int i = from; i < to; ++i) x[i] = 0;
    }
    static inline void join_split(double *) {}
};
struct Apart {
    static inline void clear_split(float *x, int from, int to) {
        for (int i = from; i < to; ++i) x[split_place(i)] = 0;
    }
    static inline void join_split(double *lanes) {
        double all[kNormLanes];
        for (int i = 0; i < kNormLanes; ++i) all[i] = lanes[split_place(i)];
        for (int i = 0; i < kNormLanes; ++i) lanes[i] = all[i];
    }
};

// How an element is kept in memory. The arithmetic is fp32 whatever it is.
struct F32 : Together {
    typedef float Kept;
    enum { is_bf16 = 0 };
    static inline Vec load(const float *p) { return Vec::load(p); }
    static inline void load_pair(const float *p, Vec &a, Vec &b) {
        a = load(p);
        b = load(p + Vec::width);
    }
    static inline void store(Vec a, float *p) { a.store(p); }
    static inline void store_pair(Vec a, Vec b, float *p) {
        a.store(p);
        b.store(p + Vec::width);
    }
    // Four vectors, and the bytes that whole_bytes or to_bytes made of them.
    static inline void load_four(const float *p, Vec &a, Vec &b, Vec &c, Vec &d) {
        load_pair(p, a, b);
        load_pair(p + 2 * Vec::width, c, d);
    }
    static inline void store_four(Bytes bytes, uint8_t *p) { bytes.store(p); }
    // Sizes and signs, what the sizes are divided by, and the 16 bits that were made of all.
    static inline Vec quotient(const Divisor &by, Vec x) { return by.exact(x); }
    static inline Halves load_sizes(const float *p, Vec &a, Vec &b) {
        load_pair(p, a, b);
        return part_signs(a, b);
    }
    static inline void store_two(Halves halves, uint16_t *p) { halves.store(p); }
    static inline void load_split(const float *p, Vec &a, Vec &b) { load_pair(p, a, b); }
    static inline void store_split(Vec a, Vec b, float *p) { store_pair(a, b, p); }
    static inline void keep_split(Vec &a, Vec &b, float *p) { keep_pair(a, b, p); }
    // Leaves in a and b what was stored.
    static inline void keep_pair(Vec &a, Vec &b, float *p) { store_pair(a, b, p); }
};
struct Bf16 : Apart {
    typedef uint16_t Kept;
    enum { is_bf16 = 1 };
    static inline Vec load(const uint16_t *p) { return widen_bf16(p); }
    static inline void load_pair(const uint16_t *p, Vec &a, Vec &b) { widen_bf16_pair(p, a, b); }
    static inline void store(Vec a, uint16_t *p) { narrow_bf16(a, p); }
    static inline void store_pair(Vec a, Vec b, uint16_t *p) { narrow_bf16_pair(a, b, p); }
    static inline void keep_pair(Vec &a, Vec &b, uint16_t *p) { keep_bf16_pair(a, b, p); }
    static inline void load_four(const uint16_t *p, Vec &a, Vec &b, Vec &c, Vec &d) {
        widen_bf16_apart(Halves::load(p), a, b);
        widen_bf16_apart(Halves::load(p + 2 * Vec::width), c, d);
    }
    static inline void store_four(Bytes bytes, uint8_t *p) { bytes.store_apart(p); }
    static inline Vec quotient(const Divisor &by, Vec x) { return by.close(x); }
    static inline Halves load_sizes(const uint16_t *p, Vec &a, Vec &b) {
        const Halves pair = Halves::load(p);
        widen_bf16_apart(pair & Halves::all(0x7fff), a, b);
        return pair;
    }
    static inline void store_two(Halves halves, uint16_t *p) { halves.store_apart(p); }
    // In any order, as long as all that one element needs is in one place. No NaN may come from anything but bf16.
    static inline void load_split(const uint16_t *p, Vec &a, Vec &b) {
        widen_bf16_split(Halves::load(p), a, b);
    }
    static inline void store_split(Vec a, Vec b, uint16_t *p) {
        narrow_bf16_split(a, b).store_apart(p);
    }
    static inline void keep_split(Vec &a, Vec &b, uint16_t *p) {
        const Halves pair = narrow_bf16_split(a, b);
        pair.store_apart(p);
        widen_bf16_split(pair, a, b);
    }
};
struct F16 : Together {
    typedef uint16_t Kept;
    enum { is_bf16 = 0 };
    static inline Vec load(const uint16_t *p) { return widen_f16(p); }
    static inline void load_pair(const uint16_t *p, Vec &a, Vec &b) {
        a = load(p);
        b = load(p + Vec::width);
    }
    static inline void store(Vec a, uint16_t *p) { narrow_f16(a, p); }
    static inline void store_pair(Vec a, Vec b, uint16_t *p) {
        narrow_f16(a, p);
        narrow_f16(b, p + Vec::width);
    }
    static inline void keep_pair(Vec &a, Vec &b, uint16_t *p) {
        store_pair(a, b, p);
        load_pair(p, a, b);
    }
    static inline void load_four(const uint16_t *p, Vec &a, Vec &b, Vec &c, Vec &d) {
        load_pair(p, a, b);
        load_pair(p + 2 * Vec::width, c, d);
    }
    static inline void store_four(Bytes bytes, uint8_t *p) { bytes.store(p); }
    static inline Vec quotient(const Divisor &by, Vec x) { return by.exact(x); }
    static inline Halves load_sizes(const uint16_t *p, Vec &a, Vec &b) {
        load_pair(p, a, b);
        return part_signs(a, b);
    }
    static inline void store_two(Halves halves, uint16_t *p) { halves.store(p); }
    static inline void load_split(const uint16_t *p, Vec &a, Vec &b) { load_pair(p, a, b); }
    static inline void store_split(Vec a, Vec b, uint16_t *p) { store_pair(a, b, p); }
    static inline void keep_split(Vec &a, Vec &b, uint16_t *p) { keep_pair(a, b, p); }
};

// Codes that are loaded in pairs, for values that are stored in pairs. They come times 2^up.
template <class P>
struct Plain : P {
    enum { up = 0, signed_up = 0 };
    static inline void codes(const uint8_t *p, Ints &a, Ints &b) {
        a = Ints::bytes(p);
        b = Ints::bytes(p + Vec::width);
    }
    static inline void signed_codes(const uint8_t *p, Ints &a, Ints &b) {
        a = Ints::signed_bytes(p);
        b = Ints::signed_bytes(p + Vec::width);
    }
};
// The same where no value can be NaN and none of the numbers is extreme: bf16 has a shorter way then.
template <class P>
struct Finite : Plain<P> {};
template <>
struct Finite<Bf16> : Bf16 {
    enum { up = kSplit, signed_up = kSplitSigned };
    static inline void codes(const uint8_t *p, Ints &a, Ints &b) { split_bytes(p, a, b); }
    static inline void signed_codes(const uint8_t *p, Ints &a, Ints &b) {
        split_signed_bytes(p, a, b);
    }
    static inline void store_pair(Vec a, Vec b, uint16_t *p) { store_split(a, b, p); }
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

struct Sgd {
    typedef SgdConstants Constants;
    enum { moments = 1 };
    const Vec scale, l2, momentum, rest, lr;
    const bool l2_on, nesterov, first;

    explicit Sgd(const Constants &c)
        : scale(Vec::all(c.grad_scale)),
          l2(Vec::all(c.l2)),
          momentum(Vec::all(c.momentum)),
          rest(Vec::all(c.rest)),
          lr(Vec::all(c.lr)),
          l2_on(c.l2 != 0),
          nesterov(c.nesterov != 0),
          first(c.first != 0) {}

    inline void operator()(Vec &p, Vec &m, Vec &, Vec g) const {
        g = g * scale;
        if (l2_on) g = g + p * l2;
        m = first ? g : m * momentum + rest * g;
        p = p - lr * (nesterov ? g + momentum * m : m);
    }
};

// Without momentum there is no buffer.
struct PlainSgd {
    typedef SgdConstants Constants;
    enum { moments = 0 };
    const Vec scale, l2, lr;
    const bool l2_on;

    explicit PlainSgd(const Constants &c)
        : scale(Vec::all(c.grad_scale)),
          l2(Vec::all(c.l2)),
          lr(Vec::all(c.lr)),
          l2_on(c.l2 != 0) {}

    inline void operator()(Vec &p, Vec &, Vec &, Vec g) const {
        g = g * scale;
        if (l2_on) g = g + p * l2;
        p = p - lr * g;
    }
};

// One whole vector of each buffer through the rule.
template <class Rule, class P, class S, class G>
inline void apply(const Rule &rule, typename P::Kept *param, typename S::Kept *first,
                  typename S::Kept *second, const typename G::Kept *grad) {
    Vec p = P::load(param), m = p, v = p;
    if (Rule::moments >= 1) m = S::load(first);
    if (Rule::moments == 2) v = S::load(second);
    rule(p, m, v, G::load(grad));
    P::store(p, param);
    if (Rule::moments >= 1) S::store(m, first);
    if (Rule::moments == 2) S::store(v, second);
}

// Two vectors: their conversions to 16 bits share instructions.
template <class Rule, class P, class S, class G>
inline void apply_pair(const Rule &rule, typename P::Kept *param, typename S::Kept *first,
                       typename S::Kept *second, const typename G::Kept *grad) {
    Vec p, q, g, h;
    P::load_pair(param, p, q);
    G::load_pair(grad, g, h);
    Vec m = p, v = p, n = q, u = q;
    if (Rule::moments >= 1) S::load_pair(first, m, n);
    if (Rule::moments == 2) S::load_pair(second, v, u);
    rule(p, m, v, g);
    rule(q, n, u, h);
    P::store_pair(p, q, param);
    if (Rule::moments >= 1) S::store_pair(m, n, first);
    if (Rule::moments == 2) S::store_pair(v, u, second);
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
    const bool one = Rule::moments >= 1, two = Rule::moments == 2;
    int64_t i = 0;
    for (; i + kBlock <= n; i += kBlock) {
        fetch_block(p + i);
        if (one) fetch_block(m + i);
        if (two) fetch_block(v + i);
        fetch_block(g + i);
        for (int64_t k = i; k < i + kBlock; k += 2 * Vec::width)
            apply_pair<Rule, P, S, G>(rule, p + k, one ? m + k : m, two ? v + k : v, g + k);
    }
    for (; i + Vec::width <= n; i += Vec::width)
        apply<Rule, P, S, G>(rule, p + i, one ? m + i : m, two ? v + i : v, g + i);
    if (i == n) return;
    for (int64_t k = 0; i + k < n; ++k) {
        last_p[k] = p[i + k];
        if (one) last_m[k] = m[i + k];
        if (two) last_v[k] = v[i + k];
        last_g[k] = g[i + k];
    }
    apply<Rule, P, S, G>(rule, last_p, last_m, last_v, last_g);
    for (int64_t k = 0; i + k < n; ++k) {
        p[i + k] = last_p[k];
        if (one) m[i + k] = last_m[k];
        if (two) v[i + k] = last_v[k];
    }
}

// What a padded copy of the last elements is made of.
template <class T>
inline void copy_some(const T *from, T *to, int64_t n) {
    for (int64_t k = 0; k < n; ++k) to[k] = from[k];
}

// To bf16, up with the probability of what is cut off: 16 random bits are added below the cut.
inline void narrow_random(Vec a, Ints random, uint16_t *p) {
    const Ints exact = bits(a), moved = exact + (random & Ints::all(0xffff));
    right(select(unordered(a), exact, moved), 16).store_words(p);
}

// Adam of bf16 params without a master copy; bf16 moments are rounded at random too, each by bits of its own.
template <class S, class G>
void adam_random(uint16_t *p, void *first, void *second, const void *grad, const uint32_t *low,
                 const uint32_t *high, int64_t n, const void *constants) {
    enum { w = Vec::width, random_state = sizeof(typename S::Kept) == 2 };
    const Adam rule(*(const AdamConstants *)constants);
    typename S::Kept *m = (typename S::Kept *)first, *v = (typename S::Kept *)second;
    const typename G::Kept *g = (const typename G::Kept *)grad;
    const auto one = [&](uint16_t *at_p, typename S::Kept *at_m, typename S::Kept *at_v,
                         const typename G::Kept *at_g, const uint32_t *at_low,
                         const uint32_t *at_high) {
        Vec x = widen_bf16(at_p), a = S::load(at_m), b = S::load(at_v);
        rule(x, a, b, G::load(at_g));
        const Ints r = Ints::load(at_low);
        narrow_random(x, r, at_p);
        if (random_state) {
            narrow_random(a, right(r, 16), (uint16_t *)at_m);
            narrow_random(b, Ints::load(at_high), (uint16_t *)at_v);
        } else {
            S::store(a, at_m);
            S::store(b, at_v);
        }
    };
    int64_t i = 0;
    for (; i + w <= n; i += w) one(p + i, m + i, v + i, g + i, low + i, high + i);
    if (i == n) return;
    uint16_t last_p[w] = {0};
    typename S::Kept last_m[w] = {0}, last_v[w] = {0};
    typename G::Kept last_g[w] = {0};
    uint32_t last_low[w] = {0}, last_high[w] = {0};
    copy_some(p + i, last_p, n - i);
    copy_some(m + i, last_m, n - i);
    copy_some(v + i, last_v, n - i);
    copy_some(g + i, last_g, n - i);
    copy_some(low + i, last_low, n - i);
    copy_some(high + i, last_high, n - i);
    one(last_p, last_m, last_v, last_g, last_low, last_high);
    copy_some(last_p, p + i, n - i);
    copy_some(last_m, m + i, n - i);
    copy_some(last_v, v + i, n - i);
}

// Random bits of elements: a hash of the seed and the index (SplitMix64), so that neither threads nor instruction sets
// show. csrc/cuda/base.cuh has the same; its random_bits are the high half. Plain integers, for the compiler to widen.
void noise(int64_t seed, int64_t index, int64_t n, uint32_t *low, uint32_t *high) {
    for (int64_t i = 0; i < n; ++i) {
        uint64_t x = (uint64_t)seed + 0x9e3779b97f4a7c15ull * ((uint64_t)(index + i) + 1);
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
        x = x ^ (x >> 31);
        low[i] = (uint32_t)x;
        high[i] = (uint32_t)(x >> 32);
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

}  // namespace

#include "isa_cast.inl"
#include "isa_lamb.inl"
#include "isa_quant.inl"
#include "isa_tiny.inl"

#define DS_BY_GRAD(R, P, S) {sweep<R, P, S, F32>, sweep<R, P, S, Bf16>, sweep<R, P, S, F16>}
#define DS_BY_STATE(R, P) {DS_BY_GRAD(R, P, F32), DS_BY_GRAD(R, P, Bf16), DS_BY_GRAD(R, P, F16)}
#define DS_BY_PARAM(R) {DS_BY_STATE(R, F32), DS_BY_STATE(R, Bf16), DS_BY_STATE(R, F16)}
#define DS_RANDOM(S) {adam_random<S, F32>, adam_random<S, Bf16>, adam_random<S, F16>}
// Without moments their dtype does not matter.
#define DS_PLAIN_STATE(P) \
    {DS_BY_GRAD(PlainSgd, P, F32), DS_BY_GRAD(PlainSgd, P, F32), DS_BY_GRAD(PlainSgd, P, F32)}
#define DS_PLAIN {DS_PLAIN_STATE(F32), DS_PLAIN_STATE(Bf16), DS_PLAIN_STATE(F16)}
#define DS_KERNELS(NAME)                                                                    \
    extern "C" const Kernels ds_kernels_##NAME = {                                          \
        #NAME,                                                                              \
        {DS_BY_PARAM(Adam), DS_BY_PARAM(Adagrad), DS_BY_PARAM(Lion), DS_BY_PARAM(Sgd), DS_PLAIN}, \
        {DS_RANDOM(F32), DS_RANDOM(Bf16)},                                                  \
        noise,                                                                              \
        {lamb_first<F32>, lamb_first<Bf16>, lamb_first<F16>},                               \
        {lamb_second<F32>, lamb_second<Bf16>, lamb_second<F16>},                            \
        lamb_update,                                                                        \
        squares,                                                                            \
        squares_f64,                                                                        \
        from_bf16,                                                                          \
        from_f16,                                                                           \
        from_e4m3,                                                                          \
        from_e5m2,                                                                          \
        to_bf16,                                                                            \
        to_f16,                                                                             \
        to_e4m3,                                                                            \
        to_e5m2,                                                                            \
        extent,                                                                             \
        extent_halves,                                                                      \
        extent_columns,                                                                     \
        scales,                                                                             \
        {quantize<F32>, quantize<Bf16>, quantize<F16>},                                     \
        quantize_columns,                                                                   \
        round_trip,                                                                         \
        {DS_DEQUANTIZE(F32), DS_DEQUANTIZE(Bf16), DS_DEQUANTIZE(F16)},                      \
        {DS_FOURS(Bf16), DS_FOURS(F16)},                                                    \
        {dequantize_columns<F32>, dequantize_columns<Bf16>, dequantize_columns<F16>},       \
        {encode<F32, Narrow>, encode<Bf16, Narrow>, encode<F16, Narrow>},                   \
        {encode<F32, Wide>, encode<Bf16, Wide>, encode<F16, Wide>},                         \
        {decode<F32, Narrow>, decode<Bf16, Narrow>, decode<F16, Narrow>},                   \
        {decode<F32, Wide>, decode<Bf16, Wide>, decode<F16, Wide>},                         \
        pack,                                                                               \
        unpack,                                                                             \
        pack_wide,                                                                          \
        unpack_wide,                                                                        \
        stream,                                                                             \
        settle};
