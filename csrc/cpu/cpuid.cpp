// SPDX-License-Identifier: Apache-2.0
// CPUID says what the CPU has; XGETBV says whether the system saves the wide registers. Both are needed: a CPU that
// has AVX-512 under a system that does not save it would lose registers at the next context switch.
#include "cpuid.h"

#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace {

struct Leaf {
    uint32_t a, b, c, d;
};

Leaf leaf(uint32_t number) {
    Leaf r = {0, 0, 0, 0};
#if defined(_MSC_VER) && !defined(__clang__)
    int regs[4];
    __cpuid(regs, 0);
    if ((uint32_t)regs[0] < number) return r;
    __cpuidex(regs, (int)number, 0);
    r = {(uint32_t)regs[0], (uint32_t)regs[1], (uint32_t)regs[2], (uint32_t)regs[3]};
#else
    __get_cpuid_count(number, 0, &r.a, &r.b, &r.c, &r.d);
#endif
    return r;
}

// XCR0: which register states the system saves. Legal only where leaf 1 reports OSXSAVE.
uint64_t saved_states() {
#if defined(_MSC_VER) && !defined(__clang__)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
#endif
}

bool bit(uint32_t word, int index) { return word >> index & 1; }

bool system_saves(uint64_t wanted) {
    return bit(leaf(1).c, 27) && (saved_states() & wanted) == wanted;
}

const uint64_t kYmm = 0x06, kZmm = 0xe6;

}  // namespace

namespace ds {

bool cpu_has_clmul() { return bit(leaf(1).c, 1); }

bool cpu_has_wide_clmul() { return cpu_has_clmul() && cpu_has_avx512() && bit(leaf(7).c, 10); }

bool cpu_has_avx2() {
    const Leaf one = leaf(1), seven = leaf(7);
    const bool all = bit(one.c, 12) && bit(one.c, 28) && bit(one.c, 29) && bit(seven.b, 5);
    return all && system_saves(kYmm);
}

bool cpu_has_avx512() {
    const Leaf seven = leaf(7);
    const bool all = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);
    return all && cpu_has_avx2() && system_saves(kZmm);
}

}  // namespace ds

#else

namespace ds {

bool cpu_has_clmul() { return false; }
bool cpu_has_wide_clmul() { return false; }
bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }

}  // namespace ds

#endif
