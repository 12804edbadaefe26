// SPDX-License-Identifier: Apache-2.0
// Bias additions on channels-last activations: out = act + bias [+ other [+ other_bias]].
#include "base.cuh"

// `other` and `other_bias` may be null. All arrays have one dtype; a bias has `channels` elements.
DS_KERNEL bias_add(const void *act, const void *bias, const void *other, const void *other_bias,
                   void *out, i32 code, i64 numel, i64 channels) {
    const i64 first = (i64)blockIdx.x * kThreads + threadIdx.x, stride = (i64)gridDim.x * kThreads;
    const bool by4 = channels % 4 == 0 && aligned4(act, code) && aligned4(bias, code) &&
                     aligned4(other, code) && aligned4(other_bias, code) && aligned4(out, code);
    if (!by4) {
        for (i64 i = first; i < numel; i += stride) {
            float sum = load(act, code, i) + load(bias, code, i % channels);
            if (other) sum += load(other, code, i);
            if (other_bias) sum += load(other_bias, code, i % channels);
            store(out, code, i, sum);
        }
        return;
    }
    // whole rows of channels, so the elements are a multiple of 4 as well
    for (i64 i = first * 4; i < numel; i += stride * 4) {
        float sum[4], more[4];
        unpack4(fetch4(act, code, i), code, sum);
        unpack4(fetch4(bias, code, i % channels), code, more);
        for (i32 k = 0; k < 4; ++k) sum[k] += more[k];
        if (other) {
            unpack4(fetch4(other, code, i), code, more);
            for (i32 k = 0; k < 4; ++k) sum[k] += more[k];
        }
        if (other_bias) {
            unpack4(fetch4(other_bias, code, i % channels), code, more);
            for (i32 k = 0; k < 4; ++k) sum[k] += more[k];
        }
        store4(out, code, i, sum);
    }
}
