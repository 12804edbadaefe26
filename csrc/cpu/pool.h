// SPDX-License-Identifier: Apache-2.0
// The library's own threads. OpenMP would bring a second run time beside torch's.
#pragma once

#include <stdint.h>

namespace ds {

typedef void (*Task)(void *context, int64_t index);

// Runs task(context, i) for each i in [0, count) on at most `threads` threads, the calling one included; returns when
// all are done. While another thread is inside, or after a thread could not be started, the work is done by fewer
// threads: which of them runs an index must not matter. Tasks must not throw.
void parallel_for(Task task, void *context, int64_t count, uint32_t threads);

// The index as far from the end of its thread's part as `index` is from the beginning.
int64_t mirrored(int64_t index, int64_t count, uint32_t threads);

}  // namespace ds
