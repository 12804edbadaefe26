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

struct Kernels {
    const char *name;
    void (*adam)(float *param, float *exp_avg, float *exp_avg_sq, const float *grad, int64_t n,
                 const AdamConstants *c);
    void (*adagrad)(float *param, float *exp_avg_sq, const float *grad, int64_t n,
                    const AdagradConstants *c);
    void (*lion)(float *param, float *exp_avg, const float *grad, int64_t n,
                 const LionConstants *c);
    // lanes[i % kNormLanes] += x[i]^2
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
