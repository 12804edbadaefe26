// SPDX-License-Identifier: Apache-2.0
// The optimizer rules, one function of one element each. The order of operations is that of the torch references.
#pragma once
#include "base.cuh"

// Toward `to` by `weight`, exact at both ends, as torch's lerp.
DS_FN float lerp(float from, float to, float weight) {
    return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

struct Adam {
    enum { kMoments = 2 };
    float l2;              // decay added to the gradient; 0 when decoupled
    float keep;            // 1 - lr * decay when decoupled, else 1
    float beta1_rest;      // 1 - beta1
    float beta2;
    float beta2_rest;      // 1 - beta2
    float root_bias2;      // sqrt(1 - beta2^step)
    float eps;
    float step_size;       // lr / (1 - beta1^step)

    DS_FN void step(const Adam &c, float &p, float &m, float &v, float g) {
        // decay: the param itself, or the gradient
        p *= c.keep;
        g += c.l2 * p;
        // moments
        m = lerp(m, g, c.beta1_rest);
        v = v * c.beta2 + c.beta2_rest * g * g;
        // bias-corrected step
        p -= c.step_size * (m / (sqrtf(v) / c.root_bias2 + c.eps));
    }
};

struct Adagrad {
    enum { kMoments = 1 };
    float l2, eps, lr;

    DS_FN void step(const Adagrad &c, float &p, float &v, float &, float g) {
        g += c.l2 * p;
        v += g * g;
        p -= c.lr * (g / (sqrtf(v) + c.eps));
    }
};

struct Lion {
    enum { kMoments = 1 };
    float keep, beta1_rest, beta2_rest, lr;

    DS_FN void step(const Lion &c, float &p, float &m, float &, float g) {
        p *= c.keep;
        // only the sign of the blend moves the param; a blend of 0 moves nothing
        const float blend = lerp(m, g, c.beta1_rest);
        p -= c.lr * (float)((blend > 0) - (blend < 0));
        m = lerp(m, g, c.beta2_rest);
    }
};

struct Lamb {
    float beta1_rest, beta2, beta2_rest, eps, decay;
    i32 eps_inside;

    DS_FN void moments(const Lamb &c, float &m, float &v, float g) {
        m = lerp(m, g, c.beta1_rest);
        v = v * c.beta2 + c.beta2_rest * g * g;
    }

    // The update before it is scaled to the param's norm.
    DS_FN float update(const Lamb &c, float p, float m, float v) {
        const float spread = c.eps_inside ? sqrtf(v + c.eps) : sqrtf(v) + c.eps;
        return m / spread + c.decay * p;
    }
};
