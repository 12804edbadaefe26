// SPDX-License-Identifier: Apache-2.0
// What every kernel stands on: fixed-width types, 16-bit floats, loads and stores by dtype code, reductions.
//
// Includes nothing of the CUDA toolkit, so NVRTC compiles it from memory anywhere. The tests compile the same text
// with a host compiler that defines the few CUDA words first (DS_HOST), and so run each kernel on the CPU.
//
// [Note: kernel arguments] A kernel is `DS_KERNEL name(...)` and takes pointers, i32, i64 and float only: the loader
// packs them by the list that the build reads from the source, and one cubin must serve Linux and Windows, whose
// `long` and struct rules differ. Dtypes are codes at run time: a kernel here waits for memory, never for a branch
// that all its threads take alike, and one entry instead of 81 keeps the pack small.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
static_assert(sizeof(i32) == 4 && sizeof(i64) == 8 && sizeof(void *) == 8, "64-bit systems only");

#ifndef DS_HOST
#define DS_FN static __device__ __forceinline__
#define DS_KERNEL extern "C" __global__ void __launch_bounds__(256)
#define DS_SHARED __shared__
#endif

enum { kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp };

// enum ds_dtype of csrc/api/ds_api.h
enum { kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3 };

struct alignas(16) Words4 { u32 x, y, z, w; };
struct alignas(8) Words2 { u32 x, y; };

// ---------------------------------------------------------------------------------------------------------------------
// 16-bit floats

#ifdef DS_HOST
DS_FN float bits_to_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
DS_FN u32 float_to_bits(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }

DS_FN float f16_to_float(u16 h) {
    const u32 sign = (u32)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
    if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
    const float small = (float)mantissa * 5.9604644775390625e-8f;  // subnormal: mantissa * 2^-24
    return sign ? -small : small;
}

DS_FN u16 float_to_f16(float f) {
    const u32 bits = float_to_bits(f), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (u16)(sign | 0x7e00);
    if (size >= 0x477ff000) return (u16)(sign | 0x7c00);  // 65520 and more round to infinity
    if (size < 0x38800000) {
        // adding 0.5 leaves the subnormal's bits, rounded to nearest even, at the low end
        return (u16)(sign | (float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000));
    }
    return (u16)(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
}
#else
DS_FN float bits_to_float(u32 bits) { return __int_as_float((i32)bits); }
DS_FN u32 float_to_bits(float f) { return (u32)__float_as_int(f); }

DS_FN float f16_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

DS_FN u16 float_to_f16(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
#endif

DS_FN float bf16_to_float(u16 h) { return bits_to_float((u32)h << 16); }

// Rounds to nearest even; integer work, so that GPUs without the instruction give the same bits.
DS_FN u16 float_to_bf16(float f) {
    const u32 bits = float_to_bits(f);
    if ((bits & 0x7fffffff) > 0x7f800000) return (u16)((bits >> 16) | 0x40);  // stay a NaN
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

DS_FN float half_to_float(u16 h, i32 code) {
    return code == kBF16 ? bf16_to_float(h) : f16_to_float(h);
}

DS_FN u16 float_to_half(float f, i32 code) {
    return code == kBF16 ? float_to_bf16(f) : float_to_f16(f);
}

// ---------------------------------------------------------------------------------------------------------------------
// elements by dtype code

DS_FN float load(const void *at, i32 code, i64 i) {
    if (code == kF32) return ((const float *)at)[i];
    if (code == kF64) return (float)((const double *)at)[i];
    return half_to_float(((const u16 *)at)[i], code);
}

DS_FN void store(void *at, i32 code, i64 i, float value) {
    if (code == kF32) ((float *)at)[i] = value;
    else if (code == kF64) ((double *)at)[i] = value;
    else ((u16 *)at)[i] = float_to_half(value, code);
}

// Four elements as they lie in memory. Fetching apart from converting lets the loads of several arrays fly at once.
DS_FN Words4 fetch4(const void *at, i32 code, i64 i) {
    if (code == kF32) return *(const Words4 *)((const float *)at + i);
    const Words2 half = *(const Words2 *)((const u16 *)at + i);
    return Words4{half.x, half.y, 0, 0};
}

DS_FN void unpack4(Words4 raw, i32 code, float *out) {
    if (code == kF32) {
        out[0] = bits_to_float(raw.x), out[1] = bits_to_float(raw.y);
        out[2] = bits_to_float(raw.z), out[3] = bits_to_float(raw.w);
        return;
    }
    out[0] = half_to_float((u16)raw.x, code), out[1] = half_to_float((u16)(raw.x >> 16), code);
    out[2] = half_to_float((u16)raw.y, code), out[3] = half_to_float((u16)(raw.y >> 16), code);
}

DS_FN u32 pair(float low, float high, i32 code) {
    return float_to_half(low, code) | (u32)float_to_half(high, code) << 16;
}

DS_FN void store4(void *at, i32 code, i64 i, const float *value) {
    if (code == kF32)
        *(Words4 *)((float *)at + i) = Words4{float_to_bits(value[0]), float_to_bits(value[1]),
                                              float_to_bits(value[2]), float_to_bits(value[3])};
    else
        *(Words2 *)((u16 *)at + i) = Words2{pair(value[0], value[1], code), pair(value[2], value[3], code)};
}

// Four elements at a time are read only where each array starts on a boundary of four.
DS_FN bool aligned4(const void *at, i32 code) {
    return ((u64)at & (code == kF32 ? 15 : 7)) == 0 && code != kF64;
}

// ---------------------------------------------------------------------------------------------------------------------
// reductions over a block of kThreads; every thread gets the result, in an order that never changes

struct Add { template <class T> DS_FN T of(T a, T b) { return a + b; } };
// A NaN wins, so that damage shows; fmax would drop it.
struct Most { DS_FN float of(float a, float b) { return a > b || a != a ? a : b; } };
struct Least { DS_FN float of(float a, float b) { return a < b || a != a ? a : b; } };

template <class Join, class T>
DS_FN T reduce_warp(T value) {
    for (i32 away = kWarp / 2; away; away /= 2)
        value = Join::of(value, __shfl_xor_sync(0xffffffffu, value, away));
    return value;
}

template <class Join, class T>
DS_FN T reduce_block(T value) {
    DS_SHARED T parts[kWarps];
    value = reduce_warp<Join>(value);
    __syncthreads();  // the last reduction's readers are done
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
    __syncthreads();
    T total = parts[0];
    for (i32 i = 1; i < kWarps; ++i) total = Join::of(total, parts[i]);
    return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// random bits for stochastic rounding: a hash of the seed and the element's index, the same on any grid

DS_FN u32 random_bits(i64 seed, i64 index) {
    u64 x = (u64)seed + 0x9e3779b97f4a7c15ull * ((u64)index + 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return (u32)((x ^ (x >> 31)) >> 32);
}

// in [0, 1)
DS_FN float random_unit(i64 seed, i64 index) {
    return (float)(random_bits(seed, index) >> 8) * 5.9604644775390625e-8f;
}
