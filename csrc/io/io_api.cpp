// SPDX-License-Identifier: Apache-2.0
// ds_io_*: the doors of the I/O queue in the C ABI.
#include <stdint.h>

#include <new>
#include <system_error>

#include "../api/ds_api.h"
#include "../api/error.h"
#include "memory.h"
#include "queue.h"

using ds::fail;

namespace {

enum : int64_t { kLeastBlock = 512, kMostBlock = 1 << 30, kMostOffset = INT64_MAX / 4 };
enum : int32_t { kMostDepth = 4096, kMostWorkers = 256 };

int bad_size(const char *name) {
    return fail(DS_BAD_STRUCT, "%s has another size than this library's", name);
}

}  // namespace

extern "C" int ds_io_open(ds_io_open_args *args) {
    if (args == nullptr || args->size != sizeof *args) return bad_size("ds_io_open_args");
    if (args->block_size < kLeastBlock || args->block_size > kMostBlock)
        return fail(DS_BAD_VALUE, "block_size %lld is not in 512 ... 2^30",
                    (long long)args->block_size);
    if (args->queue_depth < 1 || args->queue_depth > kMostDepth)
        return fail(DS_BAD_VALUE, "queue_depth %d is not in 1 ... %d", (int)args->queue_depth,
                    (int)kMostDepth);
    if (args->workers < 1 || args->workers > kMostWorkers)
        return fail(DS_BAD_VALUE, "workers %d is not in 1 ... %d", (int)args->workers,
                    (int)kMostWorkers);
    const int best = ds::io::best_backend();
    const int backend = args->backend == ds::io::kAuto ? best : args->backend;
    if (backend != best && backend != ds::io::kThreads)
        return fail(DS_BAD_VALUE, "the system has no such backend");
    ds::io::Options options;
    options.backend = backend;
    options.block = args->block_size;
    options.depth = (uint32_t)args->queue_depth;
    options.workers = (uint32_t)args->workers;
    options.single = args->single_submit != 0;
    options.overlap = args->overlap_events != 0;
    options.direct = args->direct != 0;
    args->backend = backend;
    args->queue = new (std::nothrow) ds::io::Queue(options);
    return args->queue != nullptr ? DS_OK : fail(DS_NO_MEMORY, "no memory for an I/O queue");
}

extern "C" int ds_io_submit(ds_io_submit_args *args) {
    if (args == nullptr || args->size != sizeof *args) return bad_size("ds_io_submit_args");
    args->ticket = -1;
    args->os_error = 0;
    if (args->queue == nullptr) return fail(DS_BAD_VALUE, "no queue");
    if (args->bytes < 0 || args->offset < 0 || args->offset > kMostOffset ||
        args->bytes > kMostOffset)
        return fail(DS_BAD_VALUE, "offset %lld and bytes %lld name no part of a file",
                    (long long)args->offset, (long long)args->bytes);
    if (args->bytes > 0 && args->memory == nullptr) return fail(DS_BAD_VALUE, "no memory");
    ds::io::Target target;
    target.path = args->path;
    target.given = args->given;
    target.write = args->write != 0;
    try {
        args->ticket = ((ds::io::Queue *)args->queue)
                           ->submit(target, args->offset, args->bytes, args->memory,
                                    &args->os_error);
    } catch (const std::bad_alloc &) {
        args->os_error = ds::io::error_no_memory();
    }
    return args->ticket >= 0 ? DS_OK : fail(DS_IO_FAILED, "the request cannot be queued");
}

extern "C" int ds_io_wait(ds_io_wait_args *args) {
    if (args == nullptr || args->size != sizeof *args) return bad_size("ds_io_wait_args");
    if (args->queue == nullptr) return fail(DS_BAD_VALUE, "no queue");
    ds::io::Outcome outcome;
    if (!((ds::io::Queue *)args->queue)->wait(args->ticket, args->timeout_ms, &outcome))
        return fail(DS_BAD_VALUE, "no request has the ticket %lld", (long long)args->ticket);
    args->state = outcome.state;
    args->os_error = outcome.error;
    args->moved = outcome.moved;
    args->bad_offset = outcome.bad_offset;
    args->bad_bytes = outcome.bad_bytes;
    return DS_OK;
}

extern "C" void ds_io_close(void *queue) { delete (ds::io::Queue *)queue; }

extern "C" const char *ds_io_backends(void) {
    switch (ds::io::best_backend()) {
        case ds::io::kUring:
            return "io_uring threads";
        case ds::io::kIocp:
            return "iocp threads";
        default:
            return "threads";
    }
}

extern "C" int ds_io_alloc(ds_io_memory_args *args) {
    if (args == nullptr || args->size != sizeof *args) return bad_size("ds_io_memory_args");
    args->memory = nullptr;
    if (args->bytes < 1) return fail(DS_BAD_VALUE, "bytes must be positive");
    args->memory = ds::io::aligned_memory(args->bytes);
    if (args->memory == nullptr)
        return fail(DS_NO_MEMORY, "no memory for %lld bytes", (long long)args->bytes);
    if (args->locked) args->locked = ds::io::lock_memory(args->memory, args->bytes) ? 1 : 0;
    return DS_OK;
}

extern "C" void ds_io_unlock(void *memory, int64_t bytes) {
    ds::io::unlock_memory(memory, bytes);
}

extern "C" void ds_io_free(void *memory) { ds::io::free_aligned(memory); }
