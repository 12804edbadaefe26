// SPDX-License-Identifier: Apache-2.0
// Chooses one table of kernels: the best that the CPU runs, or the one asked for.
#include "dispatch.h"

#include <stdio.h>
#include <string.h>

#include <atomic>

#include "../api/ds_api.h"
#include "../api/error.h"
#include "cpuid.h"

namespace {

bool always() { return true; }

struct Candidate {
    const Kernels *kernels;
    bool (*runs)();
};

// Best first; the last one runs everywhere.
const Candidate kCandidates[] = {
#if defined(__x86_64__) || defined(_M_X64)
    {&ds_kernels_avx512, ds::cpu_has_avx512},
    {&ds_kernels_avx2, ds::cpu_has_avx2},
#elif defined(__aarch64__) || defined(_M_ARM64)
    {&ds_kernels_neon, always},
#endif
    {&ds_kernels_scalar, always},
};

std::atomic<const Kernels *> g_kernels{nullptr};

const Kernels *best() {
    for (const Candidate &candidate : kCandidates)
        if (candidate.runs()) return candidate.kernels;
    return &ds_kernels_scalar;
}

}  // namespace

namespace ds {

const Kernels *kernels() {
    const Kernels *chosen = g_kernels.load(std::memory_order_relaxed);
    if (chosen == nullptr) {
        chosen = best();
        g_kernels.store(chosen, std::memory_order_relaxed);
    }
    return chosen;
}

}  // namespace ds

extern "C" const char *ds_isa(void) { return ds::kernels()->name; }

extern "C" const char *ds_isa_list(void) {
    static thread_local char text[64];
    size_t used = 0;
    text[0] = 0;
    for (const Candidate &candidate : kCandidates) {
        if (!candidate.runs()) continue;
        used += snprintf(text + used, sizeof text - used, used ? " %s" : "%s",
                         candidate.kernels->name);
    }
    return text;
}

extern "C" int ds_set_isa(const char *name) {
    if (strcmp(name, "auto") == 0) {
        g_kernels.store(best(), std::memory_order_relaxed);
        return DS_OK;
    }
    for (const Candidate &candidate : kCandidates) {
        if (strcmp(candidate.kernels->name, name) != 0) continue;
        if (!candidate.runs()) return ds::fail(DS_BAD_VALUE, "this CPU does not run %.40s", name);
        g_kernels.store(candidate.kernels, std::memory_order_relaxed);
        return DS_OK;
    }
    return ds::fail(DS_BAD_VALUE, "this library has no path named %.40s", name);
}
