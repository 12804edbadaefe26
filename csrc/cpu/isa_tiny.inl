// SPDX-License-Identifier: Apache-2.0
// The kernels of small floats, and how codes of few bits are packed, written once over Vec. Part of isa_unit.inl.

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// small floats

// How codes of small floats lie before they are packed.
struct Narrow {
    typedef uint8_t Kept;
    static inline void store(Ints a, uint8_t *p) { a.store_bytes(p); }
};
struct Wide {
    typedef uint16_t Kept;
    static inline void store(Ints a, uint16_t *p) { a.store_words(p); }
};

// The bits that the least normal number of a form has as a float.
inline int32_t least_normal(Tiny form) { return (2 - (1 << (form.exponent - 1)) + 127) << 23; }

struct TinyCoder {
    int mantissa, sign_at;  // bits; place of the sign
    Ints least, greatest;   // bits of the least normal number; code of the greatest value

    explicit TinyCoder(Tiny form)
        : mantissa(form.mantissa),
          sign_at(form.exponent + form.mantissa),
          least(Ints::all(least_normal(form))),
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
};

// [Note: rounding to a small float]
// A float whose last place is worth that of the code is added to the quotient, `power` * 2^(23 - mantissa): the sum has
// been rounded to nearest even by the processor. Its low half counts the last places, its upper half has the exponent,
// and the sum of both, the exponent less that of the least normal number, is the code. The quotients are
// 2^(23 - mantissa) times as large as they are, so that their own exponent is that of the float to add.
struct QuickCoder {
    Vec unit;
    Divisor by;
    Ints exponent, least;
    int weight, drop;
    Halves base;

    QuickCoder(float scale, Tiny form)
        : unit(floats(Ints::all((127 - 23 + form.mantissa) << 23))),
          by(Vec::all(scale) * unit),
          exponent(Ints::all(0x7f800000)),
          least(Ints::all(first(form))),
          weight(1 << (7 - form.mantissa)),
          drop(7 - form.mantissa),
          base(Halves::all(first(form) >> 16)) {}

    static int32_t first(Tiny form) { return least_normal(form) + ((23 - form.mantissa) << 23); }

    // Neither 1 / scale nor the quotients and their remainders lie near where numbers end. Scales are found from the
    // greatest number, so that no quotient is beyond the greatest code.
    static bool serves(float scale) { return scale > 1e-25f && scale < 1e25f; }

    template <class P>
    inline Ints sum(Vec size) const {
        const Vec q = P::quotient(by, size);
        return bits(exact_sum(q, unit, floats(larger(bits(q) & exponent, least))));
    }
    // Codes of sizes.
    template <class P>
    inline Halves codes(Vec a, Vec b) const {
        return right(join_halves(sum<P>(a), sum<P>(b), weight) - base, drop);
    }
};

// As many codes as fill the widest stores; returns how many.
template <class P>
inline int64_t encode_most(const typename P::Kept *x, uint8_t *codes, int64_t n, float scale,
                           Tiny form) {
    enum { w = Vec::width };
    const QuickCoder quick(scale, form);
    const int place = 7 - form.exponent - form.mantissa;
    const Bytes sign = Bytes::all(0x80 >> place);
    int64_t i = 0;
    for (; i + 4 * w <= n; i += 4 * w) {
        Vec a, b, c, d;
        const Halves first = P::load_sizes(x + i, a, b), second = P::load_sizes(x + i + 2 * w, c, d);
        const Bytes sizes = to_bytes(quick.codes<P>(a, b), quick.codes<P>(c, d));
        P::store_four(sizes | (right(sign_bytes(first, second), place) & sign), codes + i);
    }
    return i;
}

template <class P>
inline int64_t encode_most(const typename P::Kept *x, uint16_t *codes, int64_t n, float scale,
                           Tiny form) {
    enum { w = Vec::width };
    const QuickCoder quick(scale, form);
    const int place = 15 - form.exponent - form.mantissa;
    const Halves sign = Halves::all(0x8000 >> place);
    int64_t i = 0;
    for (; i + 2 * w <= n; i += 2 * w) {
        Vec a, b;
        const Halves signs = P::load_sizes(x + i, a, b);
        P::store_two(quick.codes<P>(a, b) | (right(signs, place) & sign), codes + i);
    }
    return i;
}

template <class P, class Codes>
void encode(const void *from, void *to, int64_t n, float scale, Tiny form, const uint32_t *random) {
    enum { w = Vec::width };
    typedef typename P::Kept Kept;
    typedef typename Codes::Kept Code;
    const TinyCoder coder(form);
    const Vec by = Vec::all(scale);
    const Kept *x = (const Kept *)from;
    Code *codes = (Code *)to;
    const auto one = [&](const Kept *in, const uint32_t *noise_at, Code *out) {
        const Vec y = P::load(in) / by;
        Codes::store(random ? coder.random(y, Ints::load(noise_at)) : coder.nearest(y), out);
    };
    int64_t i = 0;
    if (random == nullptr && QuickCoder::serves(scale))
        i = encode_most<P>(x, codes, n, scale, form);
    for (; i + w <= n; i += w) one(x + i, random ? random + i : random, codes + i);
    if (i == n) return;
    Kept last[w] = {0};
    uint32_t last_random[w] = {0};
    Code made[w];
    copy_some(x + i, last, n - i);
    if (random) copy_some(random + i, last_random, n - i);
    one(last, last_random, made);
    copy_some(made, codes + i, n - i);
}

// What codes stand for: moved to where fp16 has sign, exponent and mantissa they are fp16 of another bias. Those of six
// bits come in the upper bits of a byte, others in the lower ones.
struct TinyReader {
    int up, down;
    Halves kept;
    Vec bias;

    explicit TinyReader(Tiny form)
        : up(form.exponent + form.mantissa == 5 ? 8 : 15 - form.exponent - form.mantissa),
          down(5 - form.exponent),
          kept(Halves::all(0x8000 | ((1 << (10 + form.exponent)) - 1))),
          bias(floats(Ints::all((127 + 16 - (1 << (form.exponent - 1))) << 23))) {}

    // To be multiplied by the bias.
    inline void operator()(Halves codes, Vec &a, Vec &b) const {
        widen_f16_pair(right(left(codes, up), down) & kept, a, b);
    }
};

inline Halves halves_of(const uint8_t *p) { return Halves::bytes(p); }
inline Halves halves_of(const uint16_t *p) { return Halves::load(p); }

template <class P, class Code>
inline void decode_as(const Code *codes, typename P::Kept *to, int64_t n, const TinyReader &read,
                      Vec by) {
    enum { w = Vec::width };
    const auto two = [&](const Code *in, typename P::Kept *made) {
        Vec a, b;
        read(halves_of(in), a, b);
        P::store_pair(a * read.bias * by, b * read.bias * by, made);
    };
    int64_t i = 0;
    for (; i + 2 * w <= n; i += 2 * w) two(codes + i, to + i);
    if (i == n) return;
    Code last[2 * w] = {0};
    typename P::Kept made[2 * w];
    copy_some(codes + i, last, n - i);
    two(last, made);
    copy_some(made, to + i, n - i);
}

// Where nothing ends, bf16 has shorter ways; they return how many codes they served.
template <class Kept, class Code>
inline int64_t decode_most(const Code *, Kept *, int64_t, const TinyReader &, Vec, Tiny) {
    return 0;
}

// [Note: small floats from a table]
// A power of two commutes with rounding: codes of one mantissa differ in the exponent alone. Codes below 2^(mantissa + 1)
// are all that have to be converted; the others are the one of these that has the same mantissa, and their exponent.
inline int64_t decode_most(const uint8_t *codes, uint16_t *to, int64_t n, const TinyReader &read,
                           Vec by, Tiny form) {
    const int place = 7 - form.exponent - form.mantissa;
    const bool fours = place > 2;  // as many codes as the table has
    uint8_t few[32];
    uint16_t table[32];
    for (int i = 0; i < 32; ++i) few[i] = (uint8_t)(fours ? i : i << place);
    decode_as<Bf16>(few, table, 32, read, by);
    const ByteTable values(table);
    int64_t i = 0;
    for (; fours && i + Bytes::width <= n; i += Bytes::width) {
        Halves a, b;
        values.look_up(Bytes::load_apart(codes + i), Bytes::all(0), a, b);
        a.store_apart(to + i);
        b.store_apart(to + i + Halves::width);
    }
    if (fours) return i;
    const Bytes sign = Bytes::all(0x80), sizes = Bytes::all(0x7f >> place);
    const Bytes one = Bytes::all(1 << form.mantissa), rest = Bytes::all((1 << form.mantissa) - 1);
    for (; i + Bytes::width <= n; i += Bytes::width) {
        const Bytes code = Bytes::load_apart(codes + i), size = right(code, place) & sizes;
        const Bytes at = smaller(size, (size & rest) | one);
        Halves a, b, x, y;
        values.look_up(at, code & sign, a, b);
        ByteTable::raise(size - at, x, y);
        (a + right(x, form.mantissa + 1)).store_apart(to + i);
        (b + right(y, form.mantissa + 1)).store_apart(to + i + Halves::width);
    }
    return i;
}

// Twelve bits have the mantissa of bf16. Below the least normal number, 1.f stands where 0.f is meant: twice the number
// less twice the least one is right there and larger elsewhere.
inline int64_t decode_most(const uint16_t *codes, uint16_t *to, int64_t n, const TinyReader &,
                           Vec by, Tiny form) {
    if (form.mantissa != 7) return 0;
    const int bias = 128 - (1 << (form.exponent - 1));
    const Halves sizes = Halves::all(0x7ff), exponent = Halves::all(bias << 7);
    const Vec two = Vec::all(2), least = floats(Ints::all((int)((bias + 1) << 23 | 0x80000000u)));
    int64_t i = 0;
    for (; i + Halves::width <= n; i += Halves::width) {
        const Halves code = Halves::load(codes + i);
        Vec a, b;
        widen_bf16_split((code & sizes) + exponent, a, b);
        a = smaller(a, exact_sum(a, two, least));
        b = smaller(b, exact_sum(b, two, least));
        (narrow_bf16_split(a * by, b * by) | (left(code, 4) & Halves::all(0x8000)))
            .store_apart(to + i);
    }
    return i;
}

template <class P, class Codes>
void decode(const void *from, void *out, int64_t n, float scale, Tiny form) {
    const TinyReader read(form);
    const typename Codes::Kept *codes = (const typename Codes::Kept *)from;
    typename P::Kept *to = (typename P::Kept *)out;
    const Vec by = Vec::all(scale);
    int64_t i = 0;
    if (P::is_bf16 && scale > 1e-30f && scale < 1e30f) i = decode_most(codes, to, n, read, by, form);
    if (i < n) decode_as<P>(codes + i, to + i, n - i, read, by);
}

// ---------------------------------------------------------------------------------------------------------------------
// codes of few bits in the bytes of memory

// What does not fill a vector passes through padded copies.
void pack(const uint8_t *codes, uint8_t *out, int64_t n, int width, bool high_first) {
    int64_t i = 0;
    if (width == 4) {
        const int first = high_first ? 4 : 0, second = 4 - first;
        for (; i + kFours <= n; i += kFours) join_fours(codes + i, out + i / 2, high_first);
        for (; i < n; i += 2) out[i / 2] = (uint8_t)(codes[i] << first | codes[i + 1] << second);
        return;
    }
    for (; i + kSixes <= n; i += kSixes) join_sixes(codes + i, out + i / 4 * 3);
    if (i == n) return;
    uint8_t last[kSixes] = {0}, made[kSixes / 4 * 3];
    copy_some(codes + i, last, n - i);
    join_sixes(last, made);
    copy_some(made, out + i / 4 * 3, (n - i) / 4 * 3);
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
    for (; i + kSixes <= n; i += kSixes) {
        prefetch((const char *)in + i / 4 * 3 + kAhead);
        part_sixes(in + i / 4 * 3, codes + i);
    }
    if (i == n) return;
    uint8_t last[kSixes / 4 * 3] = {0}, made[kSixes];
    copy_some(in + i / 4 * 3, last, (n - i) / 4 * 3);
    part_sixes(last, made);
    copy_some(made, codes + i, n - i);
}

void pack_wide(const uint16_t *codes, uint8_t *out, int64_t n) {
    int64_t i = 0;
    for (; i + kTwelves <= n; i += kTwelves) join_twelves(codes + i, out + i / 2 * 3);
    if (i == n) return;
    uint16_t last[kTwelves] = {0};
    uint8_t made[kTwelves / 2 * 3];
    copy_some(codes + i, last, n - i);
    join_twelves(last, made);
    copy_some(made, out + i / 2 * 3, (n - i) / 2 * 3);
}

void unpack_wide(const uint8_t *in, uint16_t *codes, int64_t n) {
    int64_t i = 0;
    for (; i + kTwelves <= n; i += kTwelves) {
        prefetch((const char *)in + i / 2 * 3 + kAhead);
        part_twelves(in + i / 2 * 3, codes + i);
    }
    if (i == n) return;
    uint8_t last[kTwelves / 2 * 3] = {0};
    uint16_t made[kTwelves];
    copy_some(in + i / 2 * 3, last, (n - i) / 2 * 3);
    part_twelves(last, made);
    copy_some(made, codes + i, n - i);
}

}  // namespace
