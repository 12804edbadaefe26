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

// [Note: codes without division]
// Dividing takes longer than all the rest. x times the rounded 1 / scale is at most 3 units of the last place from the
// rounded x / scale; both have the same code unless a border between codes is so near. `border` tells, and the few that
// it names are divided. In units of 2^-drop of a code's last place, a number from the least normal one up is its own
// bits, one below is what adding the least normal one leaves in the low bits, and the greater of the two is right.
struct QuickCoder {
    Vec by, least;
    Ints step, offset, low_bits;
    int drop;

    QuickCoder(float scale, Tiny form)
        : by(Vec::all(1 / scale)),
          least(floats(Ints::all(least_normal(form)))),
          step(Ints::all(1 << 23)),
          offset(Ints::all((1 << 23) - least_normal(form) + (1 << (22 - form.mantissa)) + 4)),
          low_bits(Ints::all((1 << (23 - form.mantissa)) - 1)),
          drop(23 - form.mantissa) {}

    // 1 / scale and the quotients lie far from where numbers end; scales are found from the greatest number, so that no
    // quotient is beyond the greatest code.
    static bool serves(float scale) { return scale > 1e-30f && scale < 1e30f; }

    // The code without its sign, before its low bits are dropped.
    inline Ints operator()(Vec x) const {
        const Vec size = floats(bits(x * by) & Ints::all(0x7fffffff));
        return larger(bits(size + least) - step, bits(size)) + offset;
    }
    inline Ints fraction(Ints a) const { return a & low_bits; }
    inline bool border(Ints least_fraction) const { return any(less(least_fraction, Ints::all(8))); }
};

enum { kEncodeRun = 1024 };

// Some whole vectors by division.
template <class P, class Codes>
void divide(const typename P::Kept *x, typename Codes::Kept *codes, int64_t n, float scale,
            Tiny form) {
    const TinyCoder coder(form);
    const Vec by = Vec::all(scale);
    for (int64_t i = 0; i < n; i += Vec::width)
        Codes::store(coder.nearest(P::load(x + i) / by), codes + i);
}

// A run of whole blocks, four vectors each. Those with a code on a border come last: to branch off in their midst would
// cost more than to divide.
template <class P>
inline void encode_blocks(const typename P::Kept *x, uint8_t *codes, int64_t n, float scale,
                          Tiny form) {
    enum { w = Vec::width };
    const QuickCoder quick(scale, form);
    const int place = 7 - form.exponent - form.mantissa;
    const Bytes sign = Bytes::all(0x80 >> place);
    int32_t late[kEncodeRun / (4 * w) + 1];
    int count = 0;
    for (int64_t i = 0; i < n; i += 4 * w) {
        Vec a, b, c, d;
        P::load_four(x + i, a, b, c, d);
        const Ints p = quick(a), q = quick(b), r = quick(c), s = quick(d);
        const Ints nearest = smaller(smaller(quick.fraction(p), quick.fraction(q)),
                                     smaller(quick.fraction(r), quick.fraction(s)));
        late[count] = (int32_t)i;
        count += quick.border(nearest);
        const Bytes sizes = to_bytes(right(p, quick.drop), right(q, quick.drop),
                                     right(r, quick.drop), right(s, quick.drop));
        const Bytes signs = right(sign_bytes(bits(a), bits(b), bits(c), bits(d)), place) & sign;
        P::store_four(sizes | signs, codes + i);
    }
    for (int k = 0; k < count; ++k)
        divide<P, Narrow>(x + late[k], codes + late[k], 4 * w, scale, form);
}

template <class P>
inline void encode_blocks(const typename P::Kept *x, uint16_t *codes, int64_t n, float scale,
                          Tiny form) {
    enum { w = Vec::width };
    const QuickCoder quick(scale, form);
    const int sign_at = form.exponent + form.mantissa;
    int32_t late[kEncodeRun / (2 * w) + 1];
    int count = 0;
    for (int64_t i = 0; i < n; i += 2 * w) {
        Vec a, b;
        P::load_pair(x + i, a, b);
        const Ints p = quick(a), q = quick(b);
        late[count] = (int32_t)i;
        count += quick.border(smaller(quick.fraction(p), quick.fraction(q)));
        const Ints first = right(p, quick.drop) | left(right(bits(a), 31), sign_at);
        const Ints second = right(q, quick.drop) | left(right(bits(b), 31), sign_at);
        store_words_pair(first, second, codes + i);
    }
    for (int k = 0; k < count; ++k)
        divide<P, Wide>(x + late[k], codes + late[k], 2 * w, scale, form);
}

// As many codes as fill the widest stores; returns how many.
template <class P, class Code>
inline int64_t encode_most(const typename P::Kept *x, Code *codes, int64_t n, float scale,
                           Tiny form) {
    const int64_t whole = n - n % (4 * Vec::width);
    for (int64_t i = 0; i < whole; i += kEncodeRun)
        encode_blocks<P>(x + i, codes + i, whole - i < kEncodeRun ? whole - i : (int64_t)kEncodeRun,
                         scale, form);
    return whole;
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

// What codes stand for: moved to where fp16 has sign, exponent and mantissa they are fp16 of another bias.
struct TinyReader {
    int up, down;
    Halves kept;
    Vec bias;

    explicit TinyReader(Tiny form)
        : up(15 - form.exponent - form.mantissa),
          down(5 - form.exponent),
          kept(Halves::all(0x8000 | ((1 << (10 + form.exponent)) - 1))),
          bias(floats(Ints::all((127 + 16 - (1 << (form.exponent - 1))) << 23))) {}

    // To be multiplied by the bias.
    inline void operator()(Halves codes, Vec &a, Vec &b) const {
        widen_f16_pair(right(left(codes, up), down) & kept, a, b);
    }
};

template <class P, class Code>
inline void decode_as(const Code *codes, typename P::Kept *to, int64_t n, const TinyReader &read,
                      Vec first, Vec second, bool twice) {
    enum { w = Vec::width };
    const auto two = [&](const Code *in, typename P::Kept *made) {
        Vec a, b;
        read(P::codes(in), a, b);
        a = a * first;
        b = b * first;
        if (twice) {
            a = a * second;
            b = b * second;
        }
        P::store_pair(a, b, made);
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

template <class P, class Codes>
void decode(const void *from, void *out, int64_t n, float scale, Tiny form) {
    const TinyReader read(form);
    const Vec by = Vec::all(scale);
    const typename Codes::Kept *codes = (const typename Codes::Kept *)from;
    typename P::Kept *to = (typename P::Kept *)out;
    // Bias times scale is exact, and no product NaN, where the scale is ordinary.
    if (scale > -1e30f && scale < 1e30f && sizeof(*codes) == 1)
        decode_as<Finite<P>>((const uint8_t *)codes, to, n, read, by * read.bias, by, false);
    else
        decode_as<Plain<P>>(codes, to, n, read, read.bias, by, true);
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
    for (; i + kSixes <= n; i += kSixes) part_sixes(in + i / 4 * 3, codes + i);
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
    for (; i + kTwelves <= n; i += kTwelves) part_twelves(in + i / 2 * 3, codes + i);
    if (i == n) return;
    uint8_t last[kTwelves / 2 * 3] = {0};
    uint16_t made[kTwelves];
    copy_some(in + i / 2 * 3, last, (n - i) / 2 * 3);
    part_twelves(last, made);
    copy_some(made, codes + i, n - i);
}

}  // namespace
