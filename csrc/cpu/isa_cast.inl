// SPDX-License-Identifier: Apache-2.0
// The kernels of casts, written once over Vec. Part of isa_unit.inl.

namespace {

// Applies one conversion to n elements; the last ones pass through padded copies.
#define DS_CONVERSION(NAME, IN, OUT, ONE)                                   \
    void NAME(const IN *in, OUT *out, int64_t n) {                          \
        int64_t i = 0;                                                      \
        for (; i + kBlock <= n; i += kBlock) {                              \
            fetch_alone(in, i, kBlock);                                     \
            for (int64_t k = i; k < i + kBlock; k += Vec::width)            \
                ONE(in + k, out + k);                                       \
        }                                                                   \
        for (; i + Vec::width <= n; i += Vec::width) ONE(in + i, out + i);  \
        if (i == n) return;                                                 \
        IN last_in[Vec::width] = {0};                                       \
        OUT last_out[Vec::width];                                           \
        for (int64_t k = 0; i + k < n; ++k) last_in[k] = in[i + k];         \
        ONE(last_in, last_out);                                             \
        for (int64_t k = 0; i + k < n; ++k) out[i + k] = last_out[k];       \
    }

inline void one_from_bf16(const uint16_t *in, float *out) { widen_bf16(in).store(out); }
inline void one_from_f16(const uint16_t *in, float *out) { widen_f16(in).store(out); }
inline void one_to_bf16(const float *in, uint16_t *out) { narrow_bf16(Vec::load(in), out); }
inline void one_to_f16(const float *in, uint16_t *out) { narrow_f16(Vec::load(in), out); }

// Eight-bit floats of `mantissa` bits whose exponent is biased by `bias`. Subnormals: 2 x (1.f) - 2 is 2 (0.f).
inline Vec widen_eight(Ints size, int mantissa, int bias) {
    const Vec plain = floats(left(size, 23 - mantissa) + Ints::all((127 - bias) << 23));
    const Vec small = plain + (plain - floats(Ints::all((128 - bias) << 23)));
    return select(less(size, Ints::all(1 << mantissa)), small, plain);
}

// Rounded to nearest even; the caller sees to what is too large.
inline Ints narrow_eight(Ints size, int mantissa, int bias) {
    const int drop = 23 - mantissa;
    const Ints odd = right(size, drop) & Ints::all(1);
    const Ints shift = Ints::all((bias - 127) * (1 << 23) + (1 << (drop - 1)) - 1);
    const Ints plain = right(size + shift + odd, drop);
    // Adding 2^(drop + least exponent) leaves the rounded subnormal in the low bits.
    const Ints magic = Ints::all((128 - bias + drop) << 23);
    const Ints small = bits(floats(size) + floats(magic)) - magic;
    return select(less(size, Ints::all((128 - bias) << 23)), small, plain);
}

inline Ints size_of(Ints a) { return a & Ints::all(0x7fffffff); }
inline Ints eighth_sign(Ints a) { return right(a, 24) & Ints::all(0x80); }

// e4m3 has no infinity: 0x7f is its NaN, and all that is too large becomes 448.
inline void one_from_e4m3(const uint8_t *in, float *out) {
    const Ints code = Ints::bytes(in), size = code & Ints::all(0x7f);
    const Ints found = bits(widen_eight(size, 3, 7));
    const Ints value = select(less(Ints::all(0x7e), size), Ints::all(0x7fc00000), found);
    floats(value | left(code & Ints::all(0x80), 24)).store(out);
}
inline void one_to_e4m3(const float *in, uint8_t *out) {
    const Ints x = bits(Vec::load(in)), size = size_of(x);
    const Ints within = select(less(size, Ints::all(0x43e00000)), size, Ints::all(0x43e00000));  // 448
    const Ints nan = Ints::all(0x7f800000);
    const Ints code = select(less(nan, size), Ints::all(0x7f), narrow_eight(within, 3, 7));
    (code | eighth_sign(x)).store_bytes(out);
}
inline void one_from_e5m2(const uint8_t *in, float *out) {
    const Ints code = Ints::bytes(in), size = code & Ints::all(0x7f);
    const Ints odd = left(size, 21) + Ints::all(2 * (127 - 15) * (1 << 23));  // infinity and NaN
    const Ints quiet = select(less(Ints::all(0x7c), size), odd | Ints::all(0x400000), odd);
    const Ints found = bits(widen_eight(size, 2, 15));
    const Ints value = select(less(Ints::all(0x7b), size), quiet, found);
    floats(value | left(code & Ints::all(0x80), 24)).store(out);
}
inline void one_to_e5m2(const float *in, uint8_t *out) {
    const Ints x = bits(Vec::load(in)), size = size_of(x);
    const Ints large = select(less(Ints::all(0x7f800000), size), Ints::all(0x7f), Ints::all(0x7c));
    const Ints code =
        select(less(size, Ints::all(0x47800000)), narrow_eight(size, 2, 15), large);  // 65536
    (code | eighth_sign(x)).store_bytes(out);
}

DS_CONVERSION(from_bf16, uint16_t, float, one_from_bf16)
DS_CONVERSION(from_f16, uint16_t, float, one_from_f16)
DS_CONVERSION(to_bf16, float, uint16_t, one_to_bf16)
DS_CONVERSION(to_f16, float, uint16_t, one_to_f16)
DS_CONVERSION(from_e4m3, uint8_t, float, one_from_e4m3)
DS_CONVERSION(from_e5m2, uint8_t, float, one_from_e5m2)
DS_CONVERSION(to_e4m3, float, uint8_t, one_to_e4m3)
DS_CONVERSION(to_e5m2, float, uint8_t, one_to_e5m2)

#undef DS_CONVERSION

}  // namespace
