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

// Lanes of the sums of squares: the same in every instruction set, so that all give the same bits.
enum { kNormLanes = 32 };

// The optimizer rules, in the order of Kernels::sweep.
enum { kAdam, kAdagrad, kLion, kRules };

// Applies a rule to n elements; `second` is null for rules with one moment, `constants` is the rule's struct.
typedef void (*Sweep)(void *param, void *first, void *second, const void *grad, int64_t n,
                      const void *constants);

struct Kernels {
    const char *name;
    // by dtype code of the param, the moments and the gradient (see ds_dtype: fp32, bf16, fp16)
    Sweep sweep[kRules][3][3][3];
    // lanes[i % kNormLanes] is the sum of these x[i]^2
    void (*squares)(const float *x, int64_t n, double *lanes);
    void (*squares_f64)(const double *x, int64_t n, double *lanes);
    // 16-bit formats to fp32 and back, rounded to nearest even
    void (*from_bf16)(const uint16_t *in, float *out, int64_t n);
    void (*from_f16)(const uint16_t *in, float *out, int64_t n);
    void (*to_bf16)(const float *in, uint16_t *out, int64_t n);
    void (*to_f16)(const float *in, uint16_t *out, int64_t n);
};

extern "C" {
extern const Kernels ds_kernels_scalar;
extern const Kernels ds_kernels_avx2;
extern const Kernels ds_kernels_avx512;
extern const Kernels ds_kernels_neon;
}
