// SPDX-License-Identifier: Apache-2.0
// The kernels of quantization to whole numbers, written once over Vec. Part of isa_unit.inl.

namespace {

// 2^23 + 2^22: after adding it, the low bits of a small number are its nearest whole number, in two's complement.
const float kMagic = 12582912.0f;

// ---------------------------------------------------------------------------------------------------------------------
// groups of numbers

// Accumulates least and greatest; remembers whether there was a NaN.
struct Extent {
    Vec low, high;
    Mask nan;

    explicit Extent(float first)
        : low(Vec::all(first)), high(low), nan(unordered(Vec::all(first))) {}

    inline void add(Vec x) {
        nan = nan | unordered(x);
        low = smaller(x, low);
        high = larger(x, high);
    }
    inline void add(const Extent &o) {
        nan = nan | o.nan;
        low = smaller(low, o.low);
        high = larger(high, o.high);
    }
};

// Accumulates the greatest size. Sizes are in order as whole numbers too, and all NaN are greater than infinity.
struct Size {
    Ints high;

    explicit Size(float) : high(Ints::all(0)) {}

    inline void add(Vec x) { high = larger(bits(x) & Ints::all(0x7fffffff), high); }
    inline void add(const Size &o) { high = larger(high, o.high); }
};

template <class Found>
inline Found extent_of(const float *x, int64_t size) {
    Found even(x[0]), odd = even;
    int64_t i = 0;
    for (; i + 2 * Vec::width <= size; i += 2 * Vec::width) {
        fetch_alone(x, i, 2 * Vec::width);
        even.add(Vec::load(x + i));
        odd.add(Vec::load(x + i + Vec::width));
    }
    for (; i < size; i += Vec::width) {
        if (i + Vec::width <= size) {
            even.add(Vec::load(x + i));
            continue;
        }
        float last[Vec::width];
        for (int64_t k = 0; k < Vec::width; ++k) last[k] = x[i + k < size ? i + k : i];
        even.add(Vec::load(last));
    }
    even.add(odd);
    return even;
}

void extent(const float *x, int64_t groups, int64_t size, float *low, float *high) {
    const float nothing = highest(floats(Ints::all(0x7fc00000)));
    const Vec zero = Vec::all(0);
    for (int64_t group = 0; group < groups; ++group, x += size) {
        if (low == nullptr) {
            const Ints most = extent_of<Size>(x, size).high;
            const bool spoilt = any(less(Ints::all(0x7f800000), most));
            high[group] = spoilt ? nothing : highest(floats(most));
            continue;
        }
        const Extent found = extent_of<Extent>(x, size);
        const bool spoilt = any(found.nan);
        high[group] = spoilt ? nothing : highest(found.high);
        low[group] = spoilt ? nothing : -highest(zero - found.low);
    }
}

// The bits of a 16-bit float as a whole number in the same order, and back.
inline Halves in_order(Halves x) { return x ^ (right(x, 15) & Halves::all(0x7fff)); }
inline uint16_t float_bits(int x) { return (uint16_t)(x < 0 ? x ^ 0x7fff : x); }

// The greatest of a group's sizes, or its extent. Floats are in order as whole numbers where they have no sign, and in the
// reverse order where they have one. So the greatest whole number is the greatest float unless all have a sign, the
// greatest without regard to signs is the least float unless none has one; else the least whole number is.
template <bool Sizes>
struct HalfExtent {
    Halves most, farthest, least;

    explicit HalfExtent(Halves first)
        : most(Sizes ? Halves::all(0) : first), farthest(first), least(first) {}

    inline void add(Halves x) {
        if (Sizes) {
            most = larger(most, x & Halves::all(0x7fff));
            return;
        }
        most = larger(most, x);
        farthest = farther(farthest, x);
        least = smaller(least, x);
    }
    // As whole numbers in order.
    inline int high() const {
        return highest(Sizes ? most : in_order(most ^ ((most ^ least) & right(most, 15))));
    }
    inline int low() const {
        return lowest(in_order(least ^ ((least ^ farthest) & right(farthest, 15))));
    }
};

template <bool Sizes>
inline void extent_halves_as(const uint16_t *x, int64_t groups, int64_t size, int infinity,
                             uint16_t *low, uint16_t *high) {
    enum { w = Halves::width };
    for (int64_t group = 0; group < groups; ++group, x += size) {
        HalfExtent<Sizes> found(Halves::all(x[0]));
        int64_t i = 0;
        for (; i + 2 * w <= size; i += 2 * w) {
            fetch_alone(x, i, 2 * w);
            found.add(Halves::load(x + i));
            found.add(Halves::load(x + i + w));
        }
        for (; i + w <= size; i += w) found.add(Halves::load(x + i));
        if (i < size) {
            uint16_t last[w];
            for (int64_t k = 0; k < w; ++k) last[k] = x[i + k < size ? i + k : i];
            found.add(Halves::load(last));
        }
        // Beyond infinity lie the NaN, of either sign.
        const int top = found.high(), bottom = Sizes ? top : found.low();
        const bool spoilt = top > infinity || bottom < (infinity ^ -1);
        high[group] = spoilt ? 0x7fff : float_bits(top);
        if (!Sizes) low[group] = spoilt ? 0x7fff : float_bits(bottom);
    }
}

void extent_halves(const uint16_t *x, int64_t groups, int64_t size, int infinity, uint16_t *low,
                   uint16_t *high) {
    if (low == nullptr)
        extent_halves_as<true>(x, groups, size, infinity, low, high);
    else
        extent_halves_as<false>(x, groups, size, infinity, low, high);
}

void extent_columns(const float *x, int64_t n, float *low, float *high) {
    const auto one = [](const float *in, float *least, float *most) {
        const Vec v = Vec::load(in);
        const Mask nan = unordered(v);
        select(nan, v, smaller(v, Vec::load(least))).store(least);
        select(nan, v, larger(v, Vec::load(most))).store(most);
    };
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) one(x + i, low + i, high + i);
    if (i == n) return;
    float in[Vec::width] = {0}, least[Vec::width] = {0}, most[Vec::width] = {0};
    copy_some(x + i, in, n - i);
    copy_some(low + i, least, n - i);
    copy_some(high + i, most, n - i);
    one(in, least, most);
    copy_some(least, low + i, n - i);
    copy_some(most, high + i, n - i);
}

// Vectors of groups side by side; what lies behind the last one has room and harms nothing.
void scales(const Grid *grid, const float *low, const float *high, int64_t n, float *scale,
            float *step, float *offset) {
    const Vec levels = Vec::all(grid->levels), most = Vec::all(grid->most), one = Vec::all(1);
    const Vec zero = Vec::all(0), middle = Vec::all(-grid->middle), times = Vec::all(grid->times);
    for (int64_t i = 0; i < n; i += Vec::width) {
        const Vec least = Vec::load(low + i), span = times * Vec::load(high + i) - least;
        if (grid->weights) {
            // Two roundings, as torch divides a number by a tensor: what was saved before stays the same. A constant
            // group has no span.
            smaller(most, one / span * levels).store(scale + i);
            continue;
        }
        const Vec found = select(less(zero, span) | unordered(span), levels / span, one);
        found.store(scale + i);
        (one / found).store(step + i);
        (grid->asym ? middle - least * found : zero).store(offset + i);
    }
}

// One group's rounding. NaN becomes the least code.
struct Rounder {
    Vec scale, shift, offset, least, most;

    Rounder(const Rounding &r, int64_t group)
        : scale(Vec::all(r.scale[group])),
          shift(Vec::all(r.shift[group])),
          offset(Vec::all(r.offset[group])),
          least(Vec::all(r.least)),
          most(Vec::all(r.most)) {}

    inline Vec within(Vec x) const { return smaller(larger(x, least), most); }

    // Nearest, still with kMagic in it.
    inline Vec nearest(Vec x) const { return within((x - shift) * scale + offset) + Vec::all(kMagic); }

    // The whole number below the sum with a number from [0, 1).
    inline Vec random(Vec x, const uint32_t *bits_at) const {
        const Vec unit = to_float(right(Ints::load(bits_at), 8)) * Vec::all(5.9604644775390625e-8f);
        const Vec y = within((x - shift) * scale + offset + unit), magic = Vec::all(kMagic);
        const Vec whole = (y + magic) - magic;
        return select(less(y, whole), whole - Vec::all(1), whole) + magic;
    }

    inline Vec operator()(Vec x, const uint32_t *bits_at) const {
        return bits_at == nullptr ? nearest(x) : random(x, bits_at);
    }
};

// Some codes, to random or to nearest.
template <class P>
inline void quantize_some(const typename P::Kept *x, int64_t n, const Rounder &round,
                          const Rounding &rule, const uint32_t *random, uint8_t *codes) {
    enum { w = Vec::width };
    const Ints bias = Ints::all(rule.bias), mask = Ints::all(rule.mask);
    int64_t i = 0;
    for (; i + w <= n; i += w) {
        const Vec y = round(P::load(x + i), random ? random + i : nullptr);
        ((bits(y) + bias) & mask).store_bytes(codes + i);
    }
    if (i == n) return;
    typename P::Kept last[w] = {0};
    uint32_t last_random[w] = {0};
    uint8_t last_codes[w];
    copy_some(x + i, last, n - i);
    if (random) copy_some(random + i, last_random, n - i);
    const Vec y = round(P::load(last), random ? last_random : nullptr);
    ((bits(y) + bias) & mask).store_bytes(last_codes);
    copy_some(last_codes, codes + i, n - i);
}

// To nearest, as many codes of a group at a time as fill the widest stores.
template <class P, int Moved>
inline void quantize_nearest(const typename P::Kept *x, int64_t groups, int64_t size,
                             const Rounding &rule, uint8_t *codes) {
    enum { w = Vec::width };
    const Whole whole(rule.least, rule.most, rule.bias, rule.mask);
    for (int64_t group = 0; group < groups; ++group, x += size, codes += size) {
        const Vec scale = Vec::all(rule.scale[group]);
        const Vec by = Vec::all(Moved == kShift ? rule.shift[group] : rule.offset[group]);
        const auto place = [&](Vec v) {
            return Moved == kShift ? (v - by) * scale : Moved ? v * scale + by : v * scale;
        };
        int64_t i = 0;
        const int64_t most = rule.scale[group] < 3e38f ? size - 4 * w : -1;
        for (; i <= most; i += 4 * w) {
            Vec a, b, c, d;
            P::load_four(x + i, a, b, c, d);
            P::store_four(whole(place(a), place(b), place(c), place(d)), codes + i);
        }
        if (i < size)
            quantize_some<P>(x + i, size - i, Rounder(rule, group), rule, nullptr, codes + i);
    }
}

template <class P>
void quantize(const void *from, int64_t groups, int64_t size, const Rounding *given,
              const uint32_t *random, uint8_t *codes) {
    const typename P::Kept *x = (const typename P::Kept *)from;
    const Rounding rule = *given;  // a copy, which no code can be stored into
    if (random == nullptr) {
        if (rule.moved == kShift) return quantize_nearest<P, kShift>(x, groups, size, rule, codes);
        if (rule.moved) return quantize_nearest<P, kOffset>(x, groups, size, rule, codes);
        return quantize_nearest<P, 0>(x, groups, size, rule, codes);
    }
    for (int64_t group = 0; group < groups; ++group, x += size, random += size, codes += size)
        quantize_some<P>(x, size, Rounder(rule, group), rule, random, codes);
}

void round_trip(float *x, int64_t groups, int64_t size, const Rounding *rule,
                const uint32_t *random) {
    const Vec magic = Vec::all(kMagic);
    for (int64_t group = 0; group < groups; ++group, x += size) {
        const Rounder round(*rule, group);
        const Vec step = Vec::all(rule->step[group]);
        int64_t i = 0;
        for (; i + Vec::width <= size; i += Vec::width) {
            const Vec y = round(Vec::load(x + i), random ? random + i : nullptr) - magic;
            ((y - round.offset) * step).store(x + i);
        }
        if (i < size) {
            float last[Vec::width] = {0};
            uint32_t last_random[Vec::width] = {0};
            copy_some(x + i, last, size - i);
            if (random) copy_some(random + i, last_random, size - i);
            const Vec y = round(Vec::load(last), random ? last_random : nullptr) - magic;
            ((y - round.offset) * step).store(last);
            copy_some(last, x + i, size - i);
        }
        if (random) random += size;
    }
}

void quantize_columns(const float *x, int64_t n, const Rounding *rule, uint8_t *codes) {
    const Ints bias = Ints::all(rule->bias), mask = Ints::all(rule->mask);
    const Vec least = Vec::all(rule->least), most = Vec::all(rule->most);
    const auto one = [&](const float *in, const float *scale, const float *shift, uint8_t *to) {
        const Vec y = (Vec::load(in) - Vec::load(shift)) * Vec::load(scale);
        const Vec whole = smaller(larger(y, least), most) + Vec::all(kMagic);
        ((bits(whole) + bias) & mask).store_bytes(to);
    };
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width)
        one(x + i, rule->scale + i, rule->shift + i, codes + i);
    if (i == n) return;
    float in[Vec::width] = {0}, scale[Vec::width] = {0}, shift[Vec::width] = {0};
    uint8_t to[Vec::width];
    copy_some(x + i, in, n - i);
    copy_some(rule->scale + i, scale, n - i);
    copy_some(rule->shift + i, shift, n - i);
    one(in, scale, shift, to);
    copy_some(to, codes + i, n - i);
}

// What the codes of one group stand for. Codes with a sign are multiplied by a step; weights, which have none, are
// divided by their scale: both as their formats were made. Only codes with a sign and an offset, and weights without a
// minimum, are shifted; only weights with one have a base.
template <bool Signed, bool Asym>
struct Decoder {
    Vec by, shift, base;
    Ints half;

    Decoder(float by_, float shift_, float base_, int width)
        : by(Vec::all(by_)), shift(Vec::all(shift_)), base(Vec::all(base_)),
          half(Ints::all(1 << (width - 1))) {}

    // No result is NaN: numbers that end or leave the normal ones may make one.
    static bool finite(float by, float shift, float base) {
        const float size = by < 0 ? -by : by;
        const bool ordinary = size > 1e-37f && size < 3e38f;
        return ordinary && shift - shift == 0 && base - base == 0;
    }

    inline Vec operator()(Ints code) const { return value(Signed ? (code ^ half) - half : code); }
    // Of a code whose sign has been spread.
    inline Vec value(Ints code) const {
        Vec x = to_float(code);
        if (Signed == Asym) x = x - shift;
        x = Signed ? x * by : x / by;
        return !Signed && Asym ? x + base : x;
    }
};

// Codes of eight bits with a sign.
template <class P, class Value>
inline int64_t decode_signed(const uint8_t *codes, typename P::Kept *to, int64_t n,
                             const Value &decoder) {
    enum { w = Vec::width };
    int64_t i = 0;
    for (; i + 2 * w <= n; i += 2 * w) {
        Ints a, b;
        P::signed_codes(codes + i, a, b);
        P::store_pair(decoder.value(a), decoder.value(b), to + i);
    }
    return i;
}

template <class P, class Value>
inline void decode_run(const uint8_t *codes, typename P::Kept *to, int64_t n, const Value &value) {
    enum { w = Vec::width };
    int64_t i = 0;
    for (; i + 2 * w <= n; i += 2 * w) {
        Ints a, b;
        P::codes(codes + i, a, b);
        P::store_pair(value(a), value(b), to + i);
    }
    for (; i + w <= n; i += w) P::store(value(Ints::bytes(codes + i)), to + i);
    if (i == n) return;
    uint8_t last[w] = {0};
    typename P::Kept made[w];
    copy_some(codes + i, last, n - i);
    P::store(value(Ints::bytes(last)), made);
    copy_some(made, to + i, n - i);
}

// The sixteen values that codes of four bits stand for.
template <class P, class Value>
inline void values_of_fours(const Value &value, typename P::Kept *table) {
    uint8_t every[16];
    for (int i = 0; i < 16; ++i) every[i] = (uint8_t)i;
    for (int i = 0; i < 16; i += Vec::width) P::store(value(Ints::bytes(every + i)), table + i);
}

template <class P, bool Signed, bool Asym>
inline void dequantize_as(const uint8_t *codes, typename P::Kept *to, int64_t groups, int64_t size,
                          const float *by, const float *shifts, const float *bases, int width) {
    typedef Decoder<Signed, Asym> Value;
    for (int64_t group = 0; group < groups; ++group, codes += size, to += size) {
        const Value value(by[group], shifts[group], bases[group], width);
        if (width == 4) {
            float table[16];
            values_of_fours<F32>(value, table);
            const Table values(table);
            decode_run<Plain<P>>(codes, to, size, [&](Ints code) { return values[code]; });
        } else if (Value::finite(by[group], shifts[group], bases[group])) {
            int64_t i = 0;
            if (Signed && width == 8) i = decode_signed<Finite<P>>(codes, to, size, value);
            if (i < size) decode_run<Finite<P>>(codes + i, to + i, size - i, value);
        } else {
            decode_run<Plain<P>>(codes, to, size, value);
        }
    }
}

template <class P, bool Signed>
void dequantize(const uint8_t *codes, void *out, int64_t groups, int64_t size, const float *by,
                const float *shifts, const float *bases, int width, int asym) {
    typename P::Kept *to = (typename P::Kept *)out;
    if (asym)
        dequantize_as<P, Signed, true>(codes, to, groups, size, by, shifts, bases, width);
    else
        dequantize_as<P, Signed, false>(codes, to, groups, size, by, shifts, bases, width);
}

template <class P, bool Signed, bool Asym>
inline void dequantize_fours_as(const uint8_t *packed, uint16_t *to, int64_t groups, int64_t size,
                                const float *by, const float *shifts, const float *bases) {
    for (int64_t group = 0; group < groups; ++group, packed += size / 2, to += size) {
        const Decoder<Signed, Asym> value(by[group], shifts[group], bases[group], 4);
        uint16_t table[16];
        values_of_fours<P>(value, table);
        const HalfTable values(table);
        // Weights have the first code in the high half.
        for (int64_t i = 0; i < size; i += HalfTable::codes)
            values.spread(packed + i / 2, !Signed, to + i);
    }
}

template <class P, bool Signed>
void dequantize_fours(const uint8_t *packed, void *out, int64_t groups, int64_t size,
                      const float *by, const float *shifts, const float *bases, int asym) {
    uint16_t *to = (uint16_t *)out;
    if (asym)
        dequantize_fours_as<P, Signed, true>(packed, to, groups, size, by, shifts, bases);
    else
        dequantize_fours_as<P, Signed, false>(packed, to, groups, size, by, shifts, bases);
}

#define DS_DEQUANTIZE(P) {dequantize<P, false>, dequantize<P, true>}
#define DS_FOURS(P) {dequantize_fours<P, false>, dequantize_fours<P, true>}

template <class P>
void dequantize_columns(const uint8_t *codes, void *out, int64_t n, const float *scale,
                        const float *shift, const float *base) {
    enum { w = Vec::width };
    typename P::Kept *to = (typename P::Kept *)out;
    const auto value = [](const uint8_t *at, const float *by, const float *less, const float *more) {
        return (to_float(Ints::bytes(at)) - Vec::load(less)) / Vec::load(by) + Vec::load(more);
    };
    int64_t i = 0;
    for (; i + 2 * w <= n; i += 2 * w)
        P::store_pair(value(codes + i, scale + i, shift + i, base + i),
                      value(codes + i + w, scale + i + w, shift + i + w, base + i + w), to + i);
    for (; i + w <= n; i += w)
        P::store(value(codes + i, scale + i, shift + i, base + i), to + i);
    if (i == n) return;
    uint8_t last[w] = {0};
    float by[w] = {0}, less[w] = {0}, more[w] = {0};
    typename P::Kept made[w];
    copy_some(codes + i, last, n - i);
    copy_some(scale + i, by, n - i);
    copy_some(shift + i, less, n - i);
    copy_some(base + i, more, n - i);
    P::store(value(last, by, less, more), made);
    copy_some(made, to + i, n - i);
}

// Whole lines of 64 bytes past the caches: what is large would only drive out what is still wanted, and memory would be
// read before it is written over.
void stream(const void *from, void *to, int64_t bytes) {
    // Such writes wait for the address of a page where a cache would not: it is looked up two pages ahead.
    enum { kPage = 4096 };
    for (int64_t i = -(intptr_t)to & (kPage - 1); i < bytes; i += kPage)
        prefetch((const char *)to + i + 2 * kPage);
    for (int64_t i = 0; i < bytes; i += 64) stream_line((const char *)from + i, (char *)to + i);
}
void settle() { settle_streams(); }

}  // namespace
