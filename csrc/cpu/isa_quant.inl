// SPDX-License-Identifier: Apache-2.0
// The kernels of quantization, written once over Vec: groups to small whole numbers, values to small floats, and how
// codes of few bits are packed. Part of isa_unit.inl.

namespace {

// 2^23 + 2^22: after adding it, the low bits of a small number are its nearest whole number, in two's complement.
const float kMagic = 12582912.0f;

// ---------------------------------------------------------------------------------------------------------------------
// groups of numbers

// Accumulates least and greatest, or the greatest size; remembers whether there was a NaN.
struct Extent {
    Vec low, high;
    Mask nan;

    explicit Extent(float first, bool sizes)
        : low(Vec::all(sizes ? 0 : first)), high(low), nan(unordered(Vec::all(first))) {}

    inline void add(Vec x, bool sizes) {
        nan = nan | unordered(x);
        if (sizes) {
            high = larger(floats(bits(x) & Ints::all(0x7fffffff)), high);
        } else {
            low = smaller(x, low);
            high = larger(x, high);
        }
    }
};

void extent(const float *x, int64_t groups, int64_t size, float *low, float *high) {
    const bool sizes = low == nullptr;
    for (int64_t group = 0; group < groups; ++group, x += size) {
        Extent even(x[0], sizes), odd = even;
        int64_t i = 0;
        for (; i + 2 * Vec::width <= size; i += 2 * Vec::width) {
            even.add(Vec::load(x + i), sizes);
            odd.add(Vec::load(x + i + Vec::width), sizes);
        }
        for (; i < size; i += Vec::width) {
            if (i + Vec::width <= size) {
                even.add(Vec::load(x + i), sizes);
                continue;
            }
            float last[Vec::width];
            for (int64_t k = 0; k < Vec::width; ++k) last[k] = x[i + k < size ? i + k : i];
            even.add(Vec::load(last), sizes);
        }
        const bool spoilt = any(even.nan | odd.nan);
        const float nothing = highest(floats(Ints::all(0x7fc00000)));
        high[group] = spoilt ? nothing : highest(larger(even.high, odd.high));
        if (sizes) continue;
        const Vec zero = Vec::all(0);
        low[group] = spoilt ? nothing : -highest(zero - smaller(even.low, odd.low));
    }
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
    inline Vec nearest(Vec x) const {
        return within((x - shift) * scale + offset) + Vec::all(kMagic);
    }

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

void quantize(const float *x, int64_t groups, int64_t size, const Rounding *rule,
              const uint32_t *random, uint8_t *codes) {
    const Ints bias = Ints::all(rule->bias), mask = Ints::all(rule->mask);
    for (int64_t group = 0; group < groups; ++group, x += size, codes += size) {
        const Rounder round(*rule, group);
        int64_t i = 0;
        for (; i + Vec::width <= size; i += Vec::width) {
            const Vec y = round(Vec::load(x + i), random ? random + i : nullptr);
            ((bits(y) + bias) & mask).store_bytes(codes + i);
        }
        if (i < size) {
            float last[Vec::width] = {0};
            uint32_t last_random[Vec::width] = {0};
            uint8_t last_codes[Vec::width];
            copy_some(x + i, last, size - i);
            if (random) copy_some(random + i, last_random, size - i);
            const Vec y = round(Vec::load(last), random ? last_random : nullptr);
            ((bits(y) + bias) & mask).store_bytes(last_codes);
            copy_some(last_codes, codes + i, size - i);
        }
        if (random) random += size;
    }
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

// A code as a float: with a sign, its top bit counts negative.
template <bool Signed>
inline Vec code_value(const uint8_t *codes, Ints half, Ints mask) {
    const Ints code = Ints::bytes(codes);
    return to_float(Signed ? ((code + half) & mask) - half : code);
}

// What the codes of one group stand for. Codes with a sign are multiplied by a step; weights, which have none, are
// divided by their scale: both as their formats were made.
template <bool Signed>
struct Decoder {
    Vec by, shift, base;
    Ints half, mask;

    inline Vec operator()(const uint8_t *codes) const {
        const Vec x = code_value<Signed>(codes, half, mask) - shift;
        return (Signed ? x * by : x / by) + base;
    }
};

template <class P, class Value>
inline void decode_run(const uint8_t *codes, typename P::Kept *to, int64_t n, const Value &value) {
    enum { w = Vec::width };
    int64_t i = 0;
    for (; i + 2 * w <= n; i += 2 * w)
        P::store_pair(value(codes + i), value(codes + i + w), to + i);
    for (; i + w <= n; i += w) P::store(value(codes + i), to + i);
    if (i == n) return;
    uint8_t last[w] = {0};
    typename P::Kept made[w];
    copy_some(codes + i, last, n - i);
    P::store(value(last), made);
    copy_some(made, to + i, n - i);
}

template <class P, bool Signed>
void dequantize(const uint8_t *codes, void *out, int64_t groups, int64_t size, const float *by,
                const float *shifts, const float *bases, int width) {
    typename P::Kept *to = (typename P::Kept *)out;
    uint8_t every[16];
    for (int i = 0; i < 16; ++i) every[i] = (uint8_t)i;
    for (int64_t group = 0; group < groups; ++group, codes += size, to += size) {
        const Decoder<Signed> value = {Vec::all(by[group]), Vec::all(shifts[group]),
                                       Vec::all(bases[group]), Ints::all(1 << (width - 1)),
                                       Ints::all((1 << width) - 1)};
        if (width != 4) {
            decode_run<P>(codes, to, size, value);
            continue;
        }
        // Sixteen values at most: each is found once.
        float table[16];
        for (int i = 0; i < 16; i += Vec::width) value(every + i).store(table + i);
        const Table values(table);
        decode_run<P>(codes, to, size, [&](const uint8_t *at) { return values[Ints::bytes(at)]; });
    }
}

#define DS_DEQUANTIZE(P) {dequantize<P, false>, dequantize<P, true>}

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

// ---------------------------------------------------------------------------------------------------------------------
// small floats

// How codes of small floats lie before they are packed.
struct Narrow {
    typedef uint8_t Kept;
    static inline Ints load(const uint8_t *p) { return Ints::bytes(p); }
    static inline void store(Ints a, uint8_t *p) { a.store_bytes(p); }
};
struct Wide {
    typedef uint16_t Kept;
    static inline Ints load(const uint16_t *p) { return Ints::words(p); }
    static inline void store(Ints a, uint16_t *p) { a.store_words(p); }
};

struct TinyCoder {
    int mantissa, sign_at;  // bits; place of the sign
    Ints least, greatest;   // bits of the smallest normal float's exponent; code of the greatest value

    explicit TinyCoder(Tiny form)
        : mantissa(form.mantissa),
          sign_at(form.exponent + form.mantissa),
          least(Ints::all((2 - (1 << (form.exponent - 1)) + 127) << 23)),
          greatest(Ints::all((1 << (form.exponent + form.mantissa)) - 1)) {}

    // Too large, infinite or NaN becomes the greatest value.
    inline Ints finish(Ints code, Ints size, Ints x) const {
        code = select(less(greatest, code), greatest, code);
        code = select(less(size, Ints::all(0x7f800000)), code, greatest);
        return code | left(right(x, 31), sign_at);
    }

    // To nearest even: a number as large as 2^23 units of the last place is added.
    inline Ints nearest(Vec y) const {
        const Ints x = bits(y), size = x & Ints::all(0x7fffffff);
        const Ints own = size & Ints::all(0x7f800000);
        const Ints power = select(less(own, least), least, own);
        const Ints magic = power + Ints::all((23 - mantissa) << 23);
        const Ints units = bits(floats(size) + floats(magic)) - magic;
        return finish(right(power - least, 23 - mantissa) + units, size, x);
    }

    // Up with the probability of what is cut off.
    inline Ints random(Vec y, Ints noise_bits) const {
        const Ints x = bits(y), size = x & Ints::all(0x7fffffff), one = Ints::all(1);
        const Ints own = right(size, 23), lowest = right(least, 23);
        const Mask small = less(own, lowest);
        const Ints below = select(small, lowest - own, Ints::all(0));
        const Ints far = below + Ints::all(23 - mantissa);
        const Ints drop = select(less(Ints::all(31), far), Ints::all(31), far);  // bits that go
        const Ints whole = select(less(own, one), Ints::all(0),
                                  (size & Ints::all(0x7fffff)) | Ints::all(0x800000));
        const Ints cut = right_each(Ints::all(-1), Ints::all(32) - drop);
        const Ints rounded = right_each(whole + (noise_bits & cut), drop);
        const Ints normal = left(own - lowest, mantissa) + rounded;
        return finish(select(small, rounded, normal), size, x);
    }

    inline Vec value(Ints code) const {
        const Ints size = code & greatest;
        const Ints home = least - Ints::all(1 << 23);  // the exponent of subnormals, as if they had one
        const Vec plain = floats(left(size, 23 - mantissa) + home);
        const Vec tiny = plain + (plain - floats(least));
        const Ints found = bits(select(less(size, left(Ints::all(1), mantissa)), tiny, plain));
        return floats(found | left(right(code, sign_at), 31));
    }
};

template <class Codes>
inline void encode(const float *x, typename Codes::Kept *codes, int64_t n, float scale, Tiny form,
                   const uint32_t *random) {
    const TinyCoder coder(form);
    const Vec by = Vec::all(scale);
    const auto one = [&](const float *in, const uint32_t *noise_at, typename Codes::Kept *to) {
        const Vec y = Vec::load(in) / by;
        Codes::store(random ? coder.random(y, Ints::load(noise_at)) : coder.nearest(y), to);
    };
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) one(x + i, random ? random + i : random, codes + i);
    if (i == n) return;
    float last[Vec::width] = {0};
    uint32_t last_random[Vec::width] = {0};
    typename Codes::Kept made[Vec::width];
    copy_some(x + i, last, n - i);
    if (random) copy_some(random + i, last_random, n - i);
    one(last, last_random, made);
    copy_some(made, codes + i, n - i);
}

void encode_narrow(const float *x, uint8_t *codes, int64_t n, float scale, Tiny form,
                   const uint32_t *random) {
    encode<Narrow>(x, codes, n, scale, form, random);
}

void encode_wide(const float *x, uint16_t *codes, int64_t n, float scale, Tiny form,
                 const uint32_t *random) {
    encode<Wide>(x, codes, n, scale, form, random);
}

template <class P, class Codes>
void decode(const void *from, void *out, int64_t n, float scale, Tiny form) {
    enum { w = Vec::width };
    const TinyCoder coder(form);
    const Vec by = Vec::all(scale);
    const typename Codes::Kept *codes = (const typename Codes::Kept *)from;
    typename P::Kept *to = (typename P::Kept *)out;
    int64_t i = 0;
    for (; i + 2 * w <= n; i += 2 * w)
        P::store_pair(coder.value(Codes::load(codes + i)) * by,
                      coder.value(Codes::load(codes + i + w)) * by, to + i);
    for (; i + w <= n; i += w) P::store(coder.value(Codes::load(codes + i)) * by, to + i);
    if (i == n) return;
    typename Codes::Kept last[w] = {0};
    typename P::Kept made[w];
    copy_some(codes + i, last, n - i);
    P::store(coder.value(Codes::load(last)) * by, made);
    copy_some(made, to + i, n - i);
}

// ---------------------------------------------------------------------------------------------------------------------
// codes of few bits in the bytes of memory; plain loops, for the compiler to widen

inline uint64_t load_bytes(const uint8_t *p, int n) {
    uint64_t x = 0;
    for (int i = 0; i < n; ++i) x |= (uint64_t)p[i] << (8 * i);
    return x;
}

inline void store_low(uint64_t x, uint8_t *p, int n) {
    for (int i = 0; i < n; ++i) p[i] = (uint8_t)(x >> (8 * i));
}

// Eight codes of six bits in eight bytes: their 48 bits, and back, by halves.
inline uint64_t join_sixes(uint64_t x) {
    x = (x & 0x003f003f003f003full) | (x >> 2 & 0x0fc00fc00fc00fc0ull);
    x = (x & 0x00000fff00000fffull) | (x >> 4 & 0x00fff00000fff000ull);
    return (x & 0xffffffull) | (x >> 8 & 0xffffff000000ull);
}

inline uint64_t part_sixes(uint64_t x) {
    x = (x & 0xffffffull) | (x << 8 & 0x00ffffff00000000ull);
    x = (x & 0x00000fff00000fffull) | (x << 4 & 0x0fff00000fff0000ull);
    return (x & 0x003f003f003f003full) | (x << 2 & 0x3f003f003f003f00ull);
}

void pack(const uint8_t *codes, uint8_t *out, int64_t n, int width, bool high_first) {
    if (width == 4) {
        if (high_first)
            for (int64_t i = 0; i < n / 2; ++i)
                out[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
        else
            for (int64_t i = 0; i < n / 2; ++i)
                out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        return;
    }
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) store_low(join_sixes(load_bytes(codes + i, 8)), out + i / 4 * 3, 6);
    if (i < n) store_low(join_sixes(load_bytes(codes + i, 4)), out + i / 4 * 3, 3);
}

void unpack(const uint8_t *in, uint8_t *codes, int64_t n, int width, bool high_first) {
    if (width == 4) {
        const int first = high_first ? 4 : 0, second = 4 - first;
        for (int64_t i = 0; i < n / 2; ++i) {
            codes[2 * i] = in[i] >> first & 15;
            codes[2 * i + 1] = in[i] >> second & 15;
        }
        return;
    }
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) store_low(part_sixes(load_bytes(in + i / 4 * 3, 6)), codes + i, 8);
    if (i < n) store_low(part_sixes(load_bytes(in + i / 4 * 3, 3)), codes + i, 4);
}

void pack_wide(const uint16_t *codes, uint8_t *out, int64_t n) {
    for (int64_t i = 0; i < n / 2; ++i) {
        const uint32_t two = (uint32_t)codes[2 * i] | (uint32_t)codes[2 * i + 1] << 12;
        out[3 * i] = (uint8_t)two;
        out[3 * i + 1] = (uint8_t)(two >> 8);
        out[3 * i + 2] = (uint8_t)(two >> 16);
    }
}

void unpack_wide(const uint8_t *in, uint16_t *codes, int64_t n) {
    for (int64_t i = 0; i < n / 2; ++i) {
        codes[2 * i] = (uint16_t)(in[3 * i] | (in[3 * i + 1] & 15) << 8);
        codes[2 * i + 1] = (uint16_t)(in[3 * i + 1] >> 4 | in[3 * i + 2] << 4);
    }
}

}  // namespace
