// SPDX-License-Identifier: Apache-2.0
// The kernels of quantization to whole numbers, written once over Vec. Part of isa_unit.inl.

namespace {

// 2^23 + 2^22: after adding it, the low bits of a small number are its nearest whole number, in two's complement.
const float kMagic = 12582912.0f;

// ---------------------------------------------------------------------------------------------------------------------
// groups of numbers

// The bits of some numbers as whole ones.
inline Ints lanes(const float *p) { return bits(Vec::load(p)); }
inline Halves lanes(const uint16_t *p) { return Halves::load(p); }

// Of a group, as whole numbers: the greatest, the greatest without regard to signs, and the least; or the greatest of the
// sizes alone. Floats are in order as whole numbers where they have no sign, and in the reverse order where they have one.
template <class Lanes, bool Sizes>
struct Extent {
    Lanes most, farthest, least;

    explicit Extent(Lanes first) : most(first), farthest(first), least(first) {}

    inline void add(const Extent &o) {
        most = larger(most, o.most);
        if (Sizes) return;
        farthest = farther(farthest, o.farthest);
        least = smaller(least, o.least);
    }
};

template <class Lanes, bool Sizes, class T>
inline Extent<Lanes, Sizes> extent_of(const T *x, int64_t size) {
    enum { w = sizeof(Lanes) / sizeof(T), run = 2 * kBlock };
    typedef Extent<Lanes, Sizes> Found;
    const Lanes no_sign = Lanes::all((int)(0xffffffffu >> (33 - 8 * sizeof(T))));
    const auto at = [&](const T *p) { return Found(Sizes ? lanes(p) & no_sign : lanes(p)); };
    if (size < w) {
        T few[w];
        for (int64_t k = 0; k < w; ++k) few[k] = x[k < size ? k : 0];
        return at(few);
    }
    Found even = at(x), odd = even;
    int64_t i = 0;
    for (; i + run <= size; i += run) {
        fetch_block(x + i, kAloneAhead);
        fetch_block(x + i + kBlock, kAloneAhead);
        for (int k = 0; k < run; k += 2 * w) {
            even.add(at(x + i + k));
            odd.add(at(x + i + k + w));
        }
    }
    for (; i + w <= size; i += w) even.add(at(x + i));
    if (i < size) even.add(at(x + size - w));  // some of them once more
    even.add(odd);
    return even;
}

// Writes of each group the bits of the least and of the greatest; those of a NaN for groups that have one.
template <class Lanes, bool Sizes, class T, class Bits>
inline void extents_as(const T *x, int64_t groups, int64_t size, int infinity, Bits *low,
                       Bits *high) {
    const int nothing = sizeof(T) == 4 ? 0x7fc00000 : 0x7fff;
    const int negative_infinity = infinity + (int)(~0u << (8 * sizeof(T) - 1));
    for (int64_t group = 0; group < groups; ++group, x += size) {
        const Extent<Lanes, Sizes> found = extent_of<Lanes, Sizes>(x, size);
        const int most = highest(found.most);
        bool spoilt = most > infinity;  // there lie the NaN
        if (!Sizes) {
            const int least = lowest(found.least), far = farthest(found.farthest);
            spoilt = spoilt || (far < 0 && far > negative_infinity);
            low[group] = (Bits)(spoilt ? nothing : far < 0 ? far : least);
            high[group] = (Bits)(spoilt ? nothing : most < 0 ? least : most);
        } else {
            high[group] = (Bits)(spoilt ? nothing : most);
        }
    }
}

void extent(const float *x, int64_t groups, int64_t size, uint32_t *low, uint32_t *high) {
    if (low == nullptr)
        extents_as<Ints, true>(x, groups, size, 0x7f800000, low, high);
    else
        extents_as<Ints, false>(x, groups, size, 0x7f800000, low, high);
}

void extent_halves(const uint16_t *x, int64_t groups, int64_t size, int infinity, uint16_t *low,
                   uint16_t *high) {
    if (low == nullptr)
        extents_as<Halves, true>(x, groups, size, infinity, low, high);
    else
        extents_as<Halves, false>(x, groups, size, infinity, low, high);
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

// What the codes of one group stand for, which come times `unit`, a power of two. Codes with a sign are multiplied by a
// step; weights, which have none, are divided by their scale: both as their formats were made. Only codes with a sign and
// an offset, and weights without a minimum, are shifted; only weights with one have a base.
template <bool Signed, bool Asym>
struct Decoder {
    enum { has_sign = Signed };
    Vec by, shift, base;

    Decoder(float by_, float shift_, float base_, float unit)
        : by(Vec::all(by_ * (Signed ? 1 / unit : unit))),
          shift(Vec::all(shift_ * unit)),
          base(Vec::all(base_)) {}

    // Of a code whose sign has been spread.
    inline Vec operator()(Ints code) const {
        Vec x = to_float(code);
        if (Signed == Asym) x = x - shift;
        x = Signed ? x * by : x / by;
        return !Signed && Asym ? x + base : x;
    }
};

// Whether no result is NaN, and units change no bit, in all of n groups: numbers that end or leave the normal ones may
// make one or do so.
inline bool ordinary(const float *by, const float *shift, const float *base, int64_t n) {
    enum { w = Vec::width };
    const Ints no_sign = Ints::all(0x7fffffff);
    Ints least = no_sign, most = Ints::all(0);
    const auto add = [&](Vec step, Vec moved, Vec more) {
        const Ints size = bits(step) & no_sign;
        least = smaller(least, size);
        most = larger(larger(most, size), larger(bits(moved) & no_sign, bits(more) & no_sign));
    };
    int64_t i = 0;
    for (; i + w <= n; i += w) add(Vec::load(by + i), Vec::load(shift + i), Vec::load(base + i));
    for (; i < n; ++i) add(Vec::all(by[i]), Vec::all(shift[i]), Vec::all(base[i]));
    return !any(less(least, bits(Vec::all(1e-28f))) | less(bits(Vec::all(1e28f)), most));
}

// Some vectors; returns how many numbers they hold.
template <class P, bool Signed, class Value>
inline int64_t decode_pairs(const uint8_t *codes, typename P::Kept *to, int64_t n,
                            const Value &value) {
    enum { w = Vec::width, run = 2 * kBlock };
    const auto two = [&](int64_t i) {
        Ints a, b;
        if (Signed)
            P::signed_codes(codes + i, a, b);
        else
            P::codes(codes + i, a, b);
        P::store_pair(value(a), value(b), to + i);
    };
    int64_t i = 0;
    for (; i + run <= n; i += run)
        for (int k = 0; k < run; k += 2 * w) two(i + k);
    for (; i + 2 * w <= n; i += 2 * w) two(i);
    return i;
}

template <class P, class Value>
inline void decode_run(const uint8_t *codes, typename P::Kept *to, int64_t n, const Value &value) {
    enum { w = Vec::width };
    int64_t i = decode_pairs<P, false>(codes, to, n, value);
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
    const int sign = Value::has_sign ? 8 : 0;
    uint8_t every[16];
    for (int i = 0; i < 16; ++i) every[i] = (uint8_t)((i ^ sign) - sign);
    for (int i = 0; i < 16; i += Vec::width)
        P::store(value(Ints::signed_bytes(every + i)), table + i);
}

// Whole pairs of vectors of each group.
template <class P, bool Signed, bool Asym>
inline void dequantize_pairs(const uint8_t *codes, typename P::Kept *to, int64_t groups,
                             int64_t size, const float *by, const float *shifts,
                             const float *bases, float unit) {
    for (int64_t group = 0; group < groups; ++group, codes += size, to += size)
        decode_pairs<P, Signed>(codes, to, size, Decoder<Signed, Asym>(by[group], shifts[group],
                                                                       bases[group], unit));
}

// Some codes of a group, in any case.
template <class P, class Value>
inline void dequantize_some(const uint8_t *codes, typename P::Kept *to, int64_t n,
                            const Value &value, int width, int down) {
    if (width == 4) {
        float table[16];
        values_of_fours<F32>(value, table);
        const Table values(table);
        return decode_run<Plain<P>>(codes, to, n, [&](Ints code) { return values[code]; });
    }
    const Ints half = Ints::all(Value::has_sign ? 1 << (width - 1) : 0);
    decode_run<Plain<P>>(codes, to, n, [&](Ints code) {
        return value((right(code, down) ^ half) - half);
    });
}

template <class P, bool Signed, bool Asym>
inline void dequantize_as(const uint8_t *codes, typename P::Kept *to, int64_t groups, int64_t size,
                          const float *by, const float *shifts, const float *bases, int width) {
    typedef Decoder<Signed, Asym> Value;
    enum { up = Signed ? Finite<P>::signed_up : Finite<P>::up };
    const int down = width == 6 ? 2 : 0;  // these lie in the upper bits of their bytes
    const int64_t pairs = size - size % (2 * Vec::width);
    const bool all = width != 4 && ordinary(by, shifts, bases, groups);
    for (int64_t group = 0; group < groups;) {
        const int64_t end = all ? groups : group + 1;
        const bool pairs_first =
            all || (width != 4 && ordinary(by + group, shifts + group, bases + group, 1));
        const int64_t done = pairs_first ? pairs : 0;
        if (done)
            dequantize_pairs<Finite<P>, Signed, Asym>(codes + group * size, to + group * size,
                                                      end - group, size, by + group, shifts + group,
                                                      bases + group, (float)(1 << (up + down)));
        for (; done < size && group < end; ++group)
            dequantize_some<P>(codes + group * size + done, to + group * size + done, size - done,
                               Value(by[group], shifts[group], bases[group], 1), width, down);
        group = end;
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
        const Decoder<Signed, Asym> value(by[group], shifts[group], bases[group], 1);
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
