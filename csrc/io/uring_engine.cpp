// SPDX-License-Identifier: Apache-2.0
// io_uring by its system calls: no library, and no kernel header newer than the compiler's.
#include "engine.h"

#if defined(__linux__)
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <new>

namespace ds {
namespace io {

namespace {

// The kernel's numbers and structs (the same on every machine).
enum { kSetup = 425, kEnter = 426 };
enum { kRead = 22, kWrite = 23 };
enum : uint32_t {
    kFlagClamp = 1u << 4,
    kFlagCoopTaskrun = 1u << 8,
    kFlagSingleIssuer = 1u << 12,
    kFlagDeferTaskrun = 1u << 13,
    kFeatureSingleMmap = 1u << 0,
    kFeatureRwCurPos = 1u << 3,  // came with 5.6, as plain read and write did
    kEnterGetEvents = 1u << 0,
};
const off_t kRingOffset = 0, kEntriesOffset = 0x10000000;

struct Sqe {
    uint8_t opcode, flags;
    uint16_t priority;
    int32_t fd;
    uint64_t offset, address;
    uint32_t bytes, rw_flags;
    uint64_t user;
    uint64_t rest[3];
};
static_assert(sizeof(Sqe) == 64, "the kernel's struct");

struct Cqe {
    uint64_t user;
    int32_t result;
    uint32_t flags;
};
static_assert(sizeof(Cqe) == 16, "the kernel's struct");

struct RingOffsets {
    uint32_t head, tail, mask, entries, a, b, c, d;  // a..d: flags, dropped, array; or overflow, cqes
    uint64_t address;
};

struct Params {
    uint32_t sq_entries, cq_entries, flags, cpu, idle, features, wq_fd, reserved[3];
    RingOffsets sq, cq;
};
static_assert(sizeof(Params) == 120, "the kernel's struct");

uint32_t load(const uint32_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
void store(uint32_t *at, uint32_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }

class UringEngine : public Engine {
public:
    ~UringEngine() override {
        if (entries_ != nullptr) munmap(entries_, entries_bytes_);
        if (ring_ != nullptr) munmap(ring_, ring_bytes_);
        if (fd_ >= 0) close(fd_);
    }

    // False where the kernel has no io_uring, is too old, or a sandbox forbids it.
    bool open(uint32_t depth, bool single) {
        Params params;
        const uint32_t fast = kFlagCoopTaskrun | kFlagSingleIssuer | kFlagDeferTaskrun;
        const uint32_t choices[] = {fast, 0};
        for (uint32_t extra : choices) {
            memset(&params, 0, sizeof params);
            params.flags = kFlagClamp | extra;
            fd_ = (int)syscall(kSetup, depth, &params);
            if (fd_ >= 0 || errno != EINVAL) break;
        }
        const uint32_t needed = kFeatureSingleMmap | kFeatureRwCurPos;
        if (fd_ < 0 || (params.features & needed) != needed) return false;
        single_ = single;
        depth_ = depth < params.sq_entries ? depth : params.sq_entries;
        return map(params);
    }

    uint32_t depth() const override { return depth_; }

    void start(Slot *slot) override {
        const uint32_t tail = *sq_tail_, index = tail & *sq_mask_;
        Sqe *entry = &entries_[index];
        memset(entry, 0, sizeof *entry);
        entry->opcode = slot->write ? kWrite : kRead;
        entry->fd = (int32_t)slot->door;
        entry->offset = (uint64_t)slot->offset;
        entry->address = (uint64_t)(uintptr_t)slot->memory;
        entry->bytes = (uint32_t)slot->bytes;
        entry->user = (uint64_t)(uintptr_t)slot;
        sq_array_[index] = index;
        store(sq_tail_, tail + 1);
        ++waiting_;
        if (single_) enter(0);
    }

    uint32_t finish(Slot **done, uint32_t capacity) override {
        for (;;) {
            uint32_t count = reap(done, capacity);
            // Transfers that were put in the ring begin before the caller is busy with finished ones.
            if (count != 0 && waiting_ == 0) return count;
            enter(count == 0 ? 1 : 0);
            count += reap(done + count, capacity - count);
            if (count != 0) return count;
        }
    }

private:
    bool map(const Params &params) {
        const size_t sq = params.sq.c + params.sq_entries * sizeof(uint32_t);
        const size_t cq = params.cq.b + params.cq_entries * sizeof(Cqe);
        ring_bytes_ = sq > cq ? sq : cq;
        ring_ = share(ring_bytes_, kRingOffset);
        entries_bytes_ = params.sq_entries * sizeof(Sqe);
        entries_ = (Sqe *)share(entries_bytes_, kEntriesOffset);
        if (ring_ == nullptr || entries_ == nullptr) return false;
        char *base = (char *)ring_;
        sq_tail_ = (uint32_t *)(base + params.sq.tail);
        sq_mask_ = (uint32_t *)(base + params.sq.mask);
        sq_array_ = (uint32_t *)(base + params.sq.c);
        cq_head_ = (uint32_t *)(base + params.cq.head);
        cq_tail_ = (uint32_t *)(base + params.cq.tail);
        cq_mask_ = (uint32_t *)(base + params.cq.mask);
        completions_ = (Cqe *)(base + params.cq.b);
        return true;
    }

    void *share(size_t bytes, off_t offset) {
        void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_,
                        offset);
        return at == MAP_FAILED ? nullptr : at;
    }

    void enter(uint32_t wanted) {
        const long taken =
            syscall(kEnter, fd_, waiting_, wanted, kEnterGetEvents, nullptr, (size_t)0);
        if (taken > 0) waiting_ -= (uint32_t)taken;
        // Busy or interrupted: the caller comes again. Nothing else is known to happen on a ring that works.
        if (taken < 0 && errno != EINTR) sched_yield();
    }

    uint32_t reap(Slot **done, uint32_t capacity) {
        uint32_t head = *cq_head_, count = 0;
        const uint32_t tail = load(cq_tail_);
        for (; head != tail && count < capacity; ++head, ++count) {
            const Cqe &entry = completions_[head & *cq_mask_];
            done[count] = (Slot *)(uintptr_t)entry.user;
            done[count]->result = entry.result;
        }
        store(cq_head_, head);
        return count;
    }

    int fd_ = -1;
    bool single_ = false;
    uint32_t depth_ = 0, waiting_ = 0;  // waiting_: in the ring, not yet seen by the kernel
    void *ring_ = nullptr;
    size_t ring_bytes_ = 0, entries_bytes_ = 0;
    Sqe *entries_ = nullptr;
    Cqe *completions_ = nullptr;
    uint32_t *sq_tail_ = nullptr, *sq_mask_ = nullptr, *sq_array_ = nullptr;
    uint32_t *cq_head_ = nullptr, *cq_tail_ = nullptr, *cq_mask_ = nullptr;
};

}  // namespace

Engine *make_uring_engine(uint32_t depth, bool single) {
    UringEngine *engine = new (std::nothrow) UringEngine;
    if (engine != nullptr && engine->open(depth, single)) return engine;
    delete engine;
    return nullptr;
}

}  // namespace io
}  // namespace ds
#else
ds::io::Engine *ds::io::make_uring_engine(uint32_t, bool) { return nullptr; }
#endif
