// SPDX-License-Identifier: Apache-2.0
// What the entries share: sizes of dtypes, the checks of their arguments, and fp32 tiles of buffers of any dtype.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../api/ds_api.h"
#include "../api/error.h"
#include "kernels.h"

namespace ds {

inline int64_t bytes_of(int32_t dtype) {
    static const int8_t kBytes[] = {4, 2, 2, 8, 1, 1};
    return kBytes[dtype];
}

// A buffer of a call: where, how many bytes, the alignment that its elements want, whether it is written.
struct Span {
    const char *what;
    const void *at;
    int64_t bytes;
    int64_t align;
    bool written;
};

// More bytes than any machine has: such sizes would overflow when they are multiplied.
const int64_t kMostBytes = (int64_t)1 << 56;

// count * each, or -1 when that is no size of a buffer.
inline int64_t size_product(int64_t count, int64_t each) {
    if (count < 0 || each < 0) return -1;
    if (count != 0 && each > kMostBytes / count) return -1;
    return count * each;
}

template <class Args>
int check_struct(const Args *args, const char *name) {
    if (args != nullptr && args->size == sizeof(Args)) return DS_OK;
    return fail(DS_BAD_STRUCT, "%s: struct of %u bytes given, %u expected", name,
                args == nullptr ? 0u : args->size, (unsigned)sizeof(Args));
}

// None null, each aligned to its elements, and nothing written overlaps anything else.
inline int check_spans(const char *name, const Span *spans, int count) {
    for (int i = 0; i < count; ++i) {
        const Span &a = spans[i];
        if (a.bytes < 0) return fail(DS_BAD_VALUE, "%s: the size of %s overflows", name, a.what);
        if (a.bytes == 0) continue;
        if (a.at == nullptr) return fail(DS_BAD_VALUE, "%s: %s is null", name, a.what);
        if ((uintptr_t)a.at % (uintptr_t)a.align)
            return fail(DS_BAD_VALUE, "%s: %s is not aligned to its elements of %d bytes", name,
                        a.what, (int)a.align);
        for (int k = 0; k < i; ++k) {
            const Span &b = spans[k];
            const uintptr_t at = (uintptr_t)a.at, other = (uintptr_t)b.at;
            if (b.bytes == 0 || !(a.written || b.written)) continue;
            if (at < other + (uintptr_t)b.bytes && other < at + (uintptr_t)a.bytes)
                return fail(DS_BAD_VALUE, "%s: %s and %s overlap", name, b.what, a.what);
        }
    }
    return DS_OK;
}

inline int check_dtype(const char *name, const char *what, int32_t code, int32_t last) {
    if (code >= DS_F32 && code <= last) return DS_OK;
    return fail(DS_BAD_VALUE, "%s: dtype code %d of %s is not served", name, (int)code, what);
}

inline void widen(const Kernels *k, const void *home, int32_t dtype, float *to, int64_t n) {
    switch (dtype) {
        case DS_F32: memcpy(to, home, (size_t)n * sizeof(float)); break;
        case DS_BF16: k->from_bf16((const uint16_t *)home, to, n); break;
        case DS_F16: k->from_f16((const uint16_t *)home, to, n); break;
        case DS_E4M3: k->from_e4m3((const uint8_t *)home, to, n); break;
        default: k->from_e5m2((const uint8_t *)home, to, n);
    }
}

inline void narrow(const Kernels *k, const float *from, void *home, int32_t dtype, int64_t n) {
    switch (dtype) {
        case DS_F32: memcpy(home, from, (size_t)n * sizeof(float)); break;
        case DS_BF16: k->to_bf16(from, (uint16_t *)home, n); break;
        case DS_F16: k->to_f16(from, (uint16_t *)home, n); break;
        case DS_E4M3: k->to_e4m3(from, (uint8_t *)home, n); break;
        default: k->to_e5m2(from, (uint8_t *)home, n);
    }
}

// n elements as fp32: the buffer itself where it is, else widened into `scratch`.
inline const float *as_floats(const Kernels *k, const char *data, int32_t dtype, int64_t at,
                              int64_t n, float *scratch) {
    const char *home = data + at * bytes_of(dtype);
    if (dtype == DS_F32) return (const float *)home;
    widen(k, home, dtype, scratch, n);
    return scratch;
}

// Extents of groups in memory, see Kernels::extent; at most kExtents at a time.
enum { kExtents = 1024 };
inline void extents(const Kernels *k, const void *x, int32_t dtype, int64_t groups, int64_t size,
                    float *low, float *high) {
    if (dtype == DS_F32) {
        uint32_t least[kExtents], most[kExtents];
        k->extent((const float *)x, groups, size, low ? least : nullptr, most);
        memcpy(high, most, (size_t)groups * sizeof(float));
        if (low) memcpy(low, least, (size_t)groups * sizeof(float));
        return;
    }
    uint16_t least[kExtents], most[kExtents];
    const int infinity = dtype == DS_BF16 ? 0x7f80 : 0x7c00;
    k->extent_halves((const uint16_t *)x, groups, size, infinity, low ? least : nullptr, most);
    widen(k, most, dtype, high, groups);
    if (low) widen(k, least, dtype, low, groups);
}

// Output that no cache would keep until it is read is written past them; then all runs have to be whole lines.
const int64_t kLargeOutput = (int64_t)32 << 20;
inline bool past_caches(const void *out, int64_t bytes, int64_t run_bytes) {
    return bytes >= kLargeOutput && ((uintptr_t)out | (uintptr_t)run_bytes) % 64 == 0;
}

// The sum of what a kernel of squares left in its lanes, always in the same order; the lanes are used up.
inline double fold(double *lanes) {
    for (int width = kNormLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

}  // namespace ds
