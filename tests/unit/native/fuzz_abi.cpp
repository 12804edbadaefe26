// SPDX-License-Identifier: Apache-2.0
// Calls every struct-taking function of the C ABI with odd arguments, one field after the other at random but always
// the same. A call may fail in words; the sanitizers that this is built with end the program where it does worse.
//
// The table of functions and fields comes from test_fuzz_abi.py. What no callee can notice is left out: buffers are as
// long as the sizes say, aligned, and apart from each other.
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../../csrc/api/ds_api.h"

namespace {

enum Kind { kU32, kI32, kI64, kF64, kOut, kIn };

struct Field {
    const char *name;
    Kind kind;
    size_t offset;
};

struct Entry {
    const char *name;
    int (*call)(void *);
    size_t size;
    const Field *fields;
    size_t count;
};

#include "fuzz_table.inc"

enum { kBuffers = 32, kBufferBytes = 1 << 23, kMostNumel = 1024, kMostIoBytes = 1 << 16 };

uint64_t g_random = 88172645463325252ull;
uint64_t random_bits() {
    g_random ^= g_random << 13;
    g_random ^= g_random >> 7;
    return g_random ^= g_random << 17;
}

template <class T, size_t N>
T one_of(const T (&values)[N]) {
    return values[random_bits() % N];
}

char *g_buffers[kBuffers];
char g_table[32 * kMostNumel];  // rows of zeros: what a row points to no callee can check
const char *g_paths[3];
void *g_queue;
int64_t g_ticket;
int g_descriptor;

bool is(const Field &field, const char *name) { return strcmp(field.name, name) == 0; }

int64_t whole_number(const Entry &entry, const Field &field) {
    const bool io = strncmp(entry.name, "ds_io_", 6) == 0;
    const int64_t sizes[] = {INT64_MIN, -1, 0, 1, 2, 63, 64, 65, 512, kMostNumel};
    const int64_t lengths[] = {INT64_MIN, -1, 0, 1, 511, 512, 4096, kMostIoBytes, INT64_MAX};
    const int64_t places[] = {INT64_MIN, -1, 0, 1, 511, 4096, 1 << 20, INT64_MAX / 4, INT64_MAX};
    const int64_t tickets[] = {INT64_MIN, -1, 0, 1, g_ticket, g_ticket + 1, INT64_MAX};
    const int64_t given[] = {-1, g_descriptor, 1 << 30, INT64_MIN};
    if (io && is(field, "bytes")) return one_of(lengths);
    if (io && is(field, "offset")) return one_of(places);
    if (io && is(field, "ticket")) return one_of(tickets);
    if (io && is(field, "given")) return one_of(given);
    return one_of(sizes);
}

void *pointer(const Entry &entry, const Field &field, size_t index) {
    if (is(field, "queue")) return random_bits() % 8 ? g_queue : nullptr;
    if (is(field, "path")) return random_bits() % 4 ? (void *)one_of(g_paths) : nullptr;
    if (is(field, "table")) return random_bits() % 16 ? g_table : nullptr;
    return random_bits() % 16 ? g_buffers[index % kBuffers] : nullptr;
}

void fill(const Entry &entry, char *args, bool tame) {
    const int32_t small[] = {0, 0, 0, 1, 1, 2, 3, 4, 8};
    const int32_t odd[] = {INT_MIN, -1, 0, 1, 2, 3, 4, 7, 8, 257, INT_MAX};
    const uint32_t counts[] = {0, 1, 2, 3, 64, UINT_MAX};
    const double reals[] = {0, -0.0, 1, -1, 0.9, 1e-3, 1e300, 1e-300, 0.0 / 0.0, 1 / 0.0};
    for (size_t i = 0; i < entry.count; ++i) {
        const Field &field = entry.fields[i];
        char *at = args + field.offset;
        uint32_t u32 = is(field, "size") ? (uint32_t)entry.size : one_of(counts);
        const int32_t i32 = tame ? one_of(small) : one_of(odd);
        const int64_t i64 = whole_number(entry, field);
        const double f64 = one_of(reals);
        void *const p = pointer(entry, field, i);
        if (is(field, "size") && random_bits() % 32 == 0) u32 = (uint32_t)random_bits();
        switch (field.kind) {
            case kU32: memcpy(at, &u32, sizeof u32); break;
            case kI32: memcpy(at, &i32, sizeof i32); break;
            case kI64: memcpy(at, &i64, sizeof i64); break;
            case kF64: memcpy(at, &f64, sizeof f64); break;
            default: memcpy(at, (const void *)&p, sizeof p);
        }
    }
}

// What a call gave has to go back.
void after(const Entry &entry, const char *args, int status) {
    if (strcmp(entry.name, "ds_io_submit") == 0 && status == DS_OK)
        g_ticket = ((const ds_io_submit_args *)(const void *)args)->ticket;
    if (strcmp(entry.name, "ds_io_open") == 0 && status == DS_OK)
        ds_io_close(((const ds_io_open_args *)(const void *)args)->queue);
    if (strcmp(entry.name, "ds_io_alloc") == 0 && status == DS_OK)
        ds_io_free(((const ds_io_memory_args *)(const void *)args)->memory);
}

void fuzz(const Entry &entry, int rounds) {
    int accepted = 0;
    if (entry.call(nullptr) == DS_OK) abort();
    for (int round = 0; round < rounds; ++round) {
        char *args = (char *)calloc(1, entry.size);  // its own block: reading on is noticed
        fill(entry, args, round % 4 != 0);
        const int status = entry.call(args);
        if (status < DS_OK || status > 16 || (status != DS_OK && *ds_last_error() == 0)) abort();
        after(entry, args, status);
        accepted += status == DS_OK;
        free(args);
    }
    printf("%s: %d of %d accepted\n", entry.name, accepted, rounds);
}

void fuzz_names() {
    uint32_t numbers[8];
    for (int round = 0; round < 2000; ++round) {
        char name[300];
        const size_t length = random_bits() % sizeof name;
        for (size_t i = 0; i < length; ++i) name[i] = (char)random_bits();
        name[length ? length - 1 : 0] = 0;
        if (ds_set_isa(name) == DS_OK && strcmp(name, "auto") != 0 && *name != 0) abort();
        ds_abi_layout(name, numbers, (uint32_t)(random_bits() % 9));
        ds_abi_layout(kEntries[random_bits() % kEntryCount].name, numbers, 8);
    }
    ds_set_isa("auto");
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    const int rounds = atoi(argv[1]);
    g_paths[0] = argv[2];
    g_paths[1] = argv[3];
    g_paths[2] = "";
    for (char *&buffer : g_buffers) buffer = (char *)calloc(1, kBufferBytes);
    g_descriptor = open(argv[2], O_RDWR | O_CREAT, 0600);
    ds_io_open_args options = {};
    options.size = sizeof options;
    options.block_size = 4096;
    options.queue_depth = 4;
    options.workers = 2;
    if (ds_io_open(&options) != DS_OK) return 3;
    g_queue = options.queue;
    for (const Entry &entry : kEntries) {
        const bool slow = strcmp(entry.name, "ds_io_open") == 0;  // it starts threads
        fuzz(entry, slow ? rounds / 10 : rounds);
    }
    fuzz_names();
    ds_io_close(g_queue);
    ds_io_close(nullptr);
    ds_io_free(nullptr);
    for (char *buffer : g_buffers) free(buffer);
    printf("done\n");
    return 0;
}
