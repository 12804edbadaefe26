// SPDX-License-Identifier: Apache-2.0
// The table of kernels that each instruction set fills, and the constants that they take.
//
// This header is part of the ISA units: it may include nothing but <stdint.h> (see isa_unit.inl).
#pragma once

#include <stdint.h>

// Derived once a call, in double, from the arguments; each kernel reads them as floats.
struct AdamConstants {
    float grad_scale;
    float l2;              // decay added to the gradient; 0 when decoupled
    float keep;            // 1 - lr * decay when decoupled, else 1
    float beta1_rest;      // 1 - beta1
    float beta2;
    float beta2_rest;      // 1 - beta2
    float inv_root_bias2;  // 1 / sqrt(1 - beta2^step)
    float eps;
    float step_size;       // lr / (1 - beta1^step)
};

struct AdagradConstants {
    float grad_scale;
    float l2;
    float eps;
    float lr;
};

struct LionConstants {
    float grad_scale;
    float keep;  // 1 - lr * decay
    float beta1_rest;
    float beta2_rest;
    float lr;
};

struct SgdConstants {
    float grad_scale;
    float l2;
    float momentum;
    float rest;  // 1 - dampening
    float lr;
    int32_t nesterov;
    int32_t first;  // the buffer holds nothing yet
};

struct LambConstants {
    float grad_scale;
    float beta1_rest;
    float beta2;
    float beta2_rest;
    float eps;
    float decay;
    int32_t eps_inside;
};

// What a group's least and greatest lead to: levels / (times * high - low), of weights at most `most`; where numbers are
// kept with an offset, -middle - low * scale.
struct Grid {
    float levels, times, middle, most;
    int32_t weights, asym;
};

// How groups are rounded to whole numbers: (x - shift) * scale + offset, kept within [least, most], then + bias.
// One number a group (a column for *_columns).
struct Rounding {
    const float *scale, *shift, *offset, *step;
    float least, most;
    int32_t bias, mask;
    int32_t moved;  // 0, kShift or kOffset: which of them may be other than 0
};
enum { kShift = 1, kOffset };

// A float of few bits: of its exponent and of its mantissa.
struct Tiny {
    int32_t exponent, mantissa;
};

// Lanes of the sums of squares: the same in every instruction set, so that all give the same bits.
enum { kNormLanes = 32 };

// The optimizer rules, in the order of Kernels::sweep.
enum { kAdam, kAdagrad, kLion, kSgd, kPlainSgd, kRules };

// Applies a rule to n elements; moments that the rule has not are null, `constants` is the rule's struct.
typedef void (*Sweep)(void *param, void *first, void *second, const void *grad, int64_t n,
                      const void *constants);
// Adam on bf16 params, rounded by random bits of each element.
typedef void (*RandomSweep)(uint16_t *param, void *first, void *second, const void *grad,
                            const uint32_t *low, const uint32_t *high, int64_t n,
                            const void *constants);
typedef void (*LambFirst)(const void *param, void *first, void *second, const void *grad,
                          int64_t n, const LambConstants *c, double *ours, double *its);
typedef void (*LambSecond)(void *param, const void *first, const void *second, int64_t n,
                           const LambConstants *c, float size);
// Groups of `size` codes, one a byte, to values: (code - shift) * by + base of each group, or / by for codes without a
// sign and for columns.
typedef void (*DequantizeGroups)(const uint8_t *codes, void *out, int64_t groups, int64_t size,
                                 const float *by, const float *shift, const float *base, int bits,
                                 int asym);
typedef void (*DequantizeColumns)(const uint8_t *codes, void *out, int64_t n, const float *scale,
                                  const float *shift, const float *base);
// Packed codes of four bits to 16-bit values; a group is a multiple of kTableRun.
enum { kTableRun = 64 };
typedef void (*DequantizeFours)(const uint8_t *packed, void *out, int64_t groups, int64_t size,
                                const float *by, const float *shift, const float *base, int asym);
// Values of a dtype to codes, one a byte; by random bits (null: to nearest even).
typedef void (*QuantizeGroups)(const void *x, int64_t groups, int64_t size, const Rounding *rule,
                               const uint32_t *random, uint8_t *codes);
typedef void (*Encode)(const void *x, void *codes, int64_t n, float scale, Tiny form,
                       const uint32_t *random);
typedef void (*Decode)(const void *codes, void *out, int64_t n, float scale, Tiny form);

struct Kernels {
    const char *name;
    // by dtype code of the param, the moments and the gradient (see ds_dtype: fp32, bf16, fp16)
    Sweep sweep[kRules][3][3][3];
    // by dtype code of the moments (fp32, bf16) and the gradient
    RandomSweep random_adam[2][3];
    // 64 random bits each of elements index, index + 1, ...
    void (*noise)(int64_t seed, int64_t index, int64_t n, uint32_t *low, uint32_t *high);
    // All buffers of one dtype, by its code. The first walk makes the moments, and the squares of the param and of the
    // update, see `squares`; the second makes the update again and takes `size` times it off the param.
    LambFirst lamb_first[3];
    LambSecond lamb_second[3];
    void (*lamb_update)(const float *param, const float *first, const float *second, float *update,
                        int64_t n, const LambConstants *c);
    // lanes[i % kNormLanes] is the sum of these x[i]^2
    void (*squares)(const float *x, int64_t n, double *lanes);
    void (*squares_f64)(const double *x, int64_t n, double *lanes);
    // narrow formats to fp32 and back, rounded to nearest even
    void (*from_bf16)(const uint16_t *in, float *out, int64_t n);
    void (*from_f16)(const uint16_t *in, float *out, int64_t n);
    void (*from_e4m3)(const uint8_t *in, float *out, int64_t n);
    void (*from_e5m2)(const uint8_t *in, float *out, int64_t n);
    void (*to_bf16)(const float *in, uint16_t *out, int64_t n);
    void (*to_f16)(const float *in, uint16_t *out, int64_t n);
    void (*to_e4m3)(const float *in, uint8_t *out, int64_t n);
    void (*to_e5m2)(const float *in, uint8_t *out, int64_t n);
    // Bits of the least and greatest of each group (of NaN where it has one); with null `low` of the greatest size.
    // Groups lie one after the other; of 16-bit floats `infinity` has the bits. _columns takes a row of all columns into
    // account.
    void (*extent)(const float *x, int64_t groups, int64_t size, uint32_t *low, uint32_t *high);
    void (*extent_halves)(const uint16_t *x, int64_t groups, int64_t size, int infinity,
                          uint16_t *low, uint16_t *high);
    void (*extent_columns)(const float *x, int64_t n, float *low, float *high);
    // Of n groups; all have room for whole vectors.
    void (*scales)(const Grid *grid, const float *low, const float *high, int64_t n, float *scale,
                   float *step, float *offset);
    QuantizeGroups quantize[3];  // by dtype code
    void (*quantize_columns)(const float *x, int64_t n, const Rounding *rule, uint8_t *codes);
    // What codes stand for, in place.
    void (*round_trip)(float *x, int64_t groups, int64_t size, const Rounding *rule,
                       const uint32_t *random);
    DequantizeGroups dequantize[3][2];  // by dtype code, and whether codes have a sign
    DequantizeFours dequantize_fours[2][2];  // bf16 and fp16, and whether codes have a sign
    DequantizeColumns dequantize_columns[3];
    // x / scale to small floats, one a byte or (12 bits) one a word, and back; by dtype code. Beyond the greatest value
    // may lie only infinity, NaN and what rounding makes of the greatest.
    Encode encode_narrow[3];
    Encode encode_wide[3];
    Decode decode_narrow[3];
    Decode decode_wide[3];
    // n codes of 4 or 6 bits, one a byte, into n * bits / 8 bytes; 6 bits: n is a multiple of 4
    void (*pack)(const uint8_t *codes, uint8_t *out, int64_t n, int bits, bool high_first);
    void (*unpack)(const uint8_t *in, uint8_t *codes, int64_t n, int bits, bool high_first);
    // 12 bits; n is even
    void (*pack_wide)(const uint16_t *codes, uint8_t *out, int64_t n);
    void (*unpack_wide)(const uint8_t *in, uint16_t *codes, int64_t n);
    // Copies past the caches; addresses and bytes are multiples of 64. What was streamed is there for other threads
    // once it has settled.
    void (*stream)(const void *from, void *to, int64_t bytes);
    void (*settle)();
};

extern "C" {
extern const Kernels ds_kernels_scalar;
extern const Kernels ds_kernels_avx2;
extern const Kernels ds_kernels_avx512;
extern const Kernels ds_kernels_neon;
}
