// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <stdlib.h>

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ds {
namespace io {

#if defined(_WIN32)

void *aligned_memory(int64_t bytes) {
    return VirtualAlloc(nullptr, (SIZE_T)bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void free_aligned(void *memory) {
    if (memory != nullptr) VirtualFree(memory, 0, MEM_RELEASE);
}

// A process may lock as much as its minimum working set, so that has to grow first.
bool lock_memory(void *memory, int64_t bytes) {
    if (VirtualLock(memory, (SIZE_T)bytes)) return true;
    SIZE_T least = 0, most = 0;
    HANDLE self = GetCurrentProcess();
    if (!GetProcessWorkingSetSize(self, &least, &most)) return false;
    const SIZE_T more = (SIZE_T)bytes + (1 << 20);
    return SetProcessWorkingSetSize(self, least + more, most + more) &&
           VirtualLock(memory, (SIZE_T)bytes);
}

void unlock_memory(void *memory, int64_t bytes) { VirtualUnlock(memory, (SIZE_T)bytes); }

#else

void *aligned_memory(int64_t bytes) {
    // Large buffers on the boundary of huge pages: fewer pages to look up in each transfer.
    const int64_t huge = 2 << 20;
    void *memory = nullptr;
    const size_t unit = bytes >= huge ? (size_t)huge : (size_t)sysconf(_SC_PAGESIZE);
    if (posix_memalign(&memory, unit, (size_t)bytes) != 0) return nullptr;
#if defined(MADV_HUGEPAGE)
    if (bytes >= huge) madvise(memory, (size_t)bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

void free_aligned(void *memory) { free(memory); }

bool lock_memory(void *memory, int64_t bytes) { return mlock(memory, (size_t)bytes) == 0; }

void unlock_memory(void *memory, int64_t bytes) { munlock(memory, (size_t)bytes); }

#endif

}  // namespace io
}  // namespace ds
