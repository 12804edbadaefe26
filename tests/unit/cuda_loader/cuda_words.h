// SPDX-License-Identifier: Apache-2.0
// The CUDA words that csrc/cuda uses, for a host compiler: each thread of a block is a fiber of one CPU thread.
//
// A fiber runs until it meets a barrier or a shuffle and goes on when its block or warp has met it too; a block whose
// fibers wait for different things is a deadlock on a GPU and an error here.
#pragma once
#define DS_HOST 1
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define DS_FN static inline
#define DS_KERNEL static void
#define DS_SHARED static

struct Place { unsigned x; };
extern Place threadIdx, blockIdx, gridDim, blockDim;

enum { kBlockBarrier = 1, kWarpBarrier = 2 };
void host_wait(int barrier);
extern unsigned char host_slots[1024][16];

static inline void __syncthreads() { host_wait(kBlockBarrier); }

template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int away) {
    memcpy(host_slots[threadIdx.x], &value, sizeof(T));
    host_wait(kWarpBarrier);
    T other;
    memcpy(&other, host_slots[threadIdx.x ^ away], sizeof(T));
    host_wait(kWarpBarrier);
    return other;
}

static inline int atomicAdd(int *at, int value) { const int old = *at; *at += value; return old; }

// Calls a kernel with arguments from the buffer that the loader packed: each on its natural boundary.
struct Arguments {
    const char *at;
    size_t used, size;
    template <class T> T take() {
        used = (used + alignof(T) - 1) / alignof(T) * alignof(T);
        T value;
        if (used + sizeof(T) > size) { fprintf(stderr, "argument buffer too short\n"); abort(); }
        memcpy(&value, at + used, sizeof(T));
        used += sizeof(T);
        return value;
    }
};

template <auto kernel> struct Call;
template <class... A, void (*kernel)(A...)>
struct Call<kernel> {
    struct Run {
        size_t used;
        Run(Arguments &&from, A... arguments) : used(from.used) { kernel(arguments...); }
    };
    static void run(const void *buffer, size_t size) {
        Arguments from = {(const char *)buffer, 0, size};
        Run{(Arguments &&)from, from.take<A>()...};  // braces: the arguments are taken in order
        if (from.used != size) { fprintf(stderr, "argument buffer too long\n"); abort(); }
    }
};

struct HostKernel { const char *name; void (*run)(const void *, size_t); };
