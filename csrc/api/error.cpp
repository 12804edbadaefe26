// SPDX-License-Identifier: Apache-2.0
// ds_last_error, ds_abi_version and ds_abi_layout: what the loader asks before and after calls.
#include "error.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "ds_api.h"

namespace {

thread_local char t_message[256];

struct Layout {
    const char *name;
    const uint32_t *numbers;
    uint32_t count;
};

#include "layout.inc"

}  // namespace

namespace ds {

int fail(int status, const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    vsnprintf(t_message, sizeof t_message, format, rest);
    va_end(rest);
    return status;
}

}  // namespace ds

extern "C" const char *ds_last_error(void) { return t_message; }

extern "C" uint32_t ds_abi_version(void) { return DS_ABI_VERSION; }

extern "C" uint32_t ds_abi_layout(const char *name, uint32_t *out, uint32_t capacity) {
    for (const Layout &layout : kLayouts) {
        if (strcmp(layout.name, name) != 0) continue;
        for (uint32_t i = 0; i < layout.count && i < capacity; ++i) out[i] = layout.numbers[i];
        return layout.count;
    }
    return 0;
}
