// SPDX-License-Identifier: Apache-2.0
// Memory on page boundaries that the system keeps in place, where it lets us.
#pragma once

#include <stdint.h>

namespace ds {
namespace io {

// Null without memory. Large buffers lie on the boundary of huge pages.
void *aligned_memory(int64_t bytes);
void free_aligned(void *memory);

// False where a limit forbids it: the memory works all the same.
bool lock_memory(void *memory, int64_t bytes);
void unlock_memory(void *memory, int64_t bytes);

}  // namespace io
}  // namespace ds
