// SPDX-License-Identifier: Apache-2.0
#include "worker.h"

#include <string.h>

#include <new>

#include "memory.h"

namespace ds {
namespace io {

namespace {

int64_t down(int64_t value, int64_t unit) { return value - value % unit; }
int64_t up(int64_t value, int64_t unit) { return down(value + unit - 1, unit); }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

Engine *make_engine(const Options &options) {
    Engine *made = nullptr;
    if (options.backend == kUring) made = make_uring_engine(options.depth, options.single);
    if (options.backend == kIocp) made = make_iocp_engine(options.depth);
    // A process may run out of what a ring needs: then by plain calls.
    return made != nullptr ? made : make_sync_engine();
}

}  // namespace

Worker::Worker(Queue *queue, const Options &options)
    : queue_(queue), options_(options), engine_(make_engine(options)) {
    if (!engine_) throw std::bad_alloc();
    slots_.resize(engine_->depth());
    finished_.resize(engine_->depth());
    for (Slot &slot : slots_) {
        memset((void *)&slot, 0, sizeof slot);
        free_.push_back(&slot);
    }
}

Worker::~Worker() {
    for (Slot &slot : slots_) free_aligned(slot.bounce);
}

void Worker::run() {
    for (;;) {
        // With `overlap` each finished piece makes room for the next one at once.
        if (options_.overlap || free_.size() * 2 >= slots_.size()) fill();
        if (free_.size() == slots_.size()) {
            if (part_ != nullptr) continue;
            return;  // nothing is under way, and nothing will come
        }
        const uint32_t count = engine_->finish(finished_.data(), (uint32_t)finished_.size());
        for (uint32_t i = 0; i < count; ++i)
            if (settle(finished_[i])) free_.push_back(finished_[i]);
    }
}

void Worker::fill() {
    while (!free_.empty()) {
        if (part_ == nullptr) {
            part_ = queue_->take(free_.size() == slots_.size());
            if (part_ == nullptr) return;
            if (!open(part_)) part_->stopped = true;
        }
        Part *part = part_;
        if (queue_->hopeless(part)) part->stopped = true;
        if (part->stopped || part->next == part->end) {
            part_ = nullptr;
            if (part->under_way == 0) leave(part);
            continue;
        }
        Slot *slot = free_.back();
        cut(part, slot);
        ++part->under_way;
        if (send(slot)) {
            free_.pop_back();
        } else {
            --part->under_way;
        }
    }
}

bool Worker::open(Part *part) {
    Request &request = *part->request;
    part->file.no_direct = !options_.direct;
    // Room for the whole request, by whichever part comes first.
    int error = 0;
    if (request.target.write && request.bytes > 0)
        error = reserve(&part->file, request.target, request.offset + request.bytes);
    if (error != 0)
        queue_->fail(part, kFailed, error, request.offset, request.bytes);
    else if (part->begin == part->end)
        return open_door(part, false);  // no bytes: the file must be there (or be made) all the same
    return error == 0;
}

bool Worker::open_door(Part *part, bool direct) {
    intptr_t &door = direct ? part->file.direct : part->file.cached;
    if (door != File::kClosed) return true;
    int error = io::open_door(&part->file, part->request->target, direct);
    if (error == 0 && door != File::kClosed) error = engine_->attach(door);
    if (error == 0) return true;
    const Request &request = *part->request;
    queue_->fail(part, kFailed, error, request.offset, request.bytes);
    return false;
}

void Worker::cut(Part *part, Slot *slot) {
    const int64_t block = options_.block, unit = part->file.file_align, at = part->next;
    int64_t end = smaller(part->end, down(at, block) + block);
    if (!part->file.no_direct) {
        // Head and tail that do not fill a unit become pieces of their own.
        const int64_t first = up(at, unit), last = down(end, unit);
        if (at < first && first <= end)
            end = first;
        else if (at < last)
            end = last;
    }
    slot->part = part;
    slot->write = part->request->target.write;
    slot->wanted = part->request->memory + (at - part->request->offset);
    slot->offset = at;
    slot->bytes = end - at;
    slot->by_cache = false;
    part->next = end;
}

bool Worker::send(Slot *slot) {
    Part *part = slot->part;
    File &file = part->file;
    const bool whole = slot->offset % file.file_align == 0 && slot->bytes % file.file_align == 0;
    bool direct = whole && !slot->by_cache && !file.no_direct;
    if (direct) {
        if (!open_door(part, true)) return false;
        // The file may have a larger unit than was assumed when the piece was cut, or no such door.
        direct = !file.no_direct && slot->offset % file.file_align == 0 &&
                 slot->bytes % file.file_align == 0;
    }
    slot->memory = slot->wanted;
    if (direct && (uintptr_t)slot->wanted % file.memory_align != 0) {
        if (slot->bounce == nullptr)
            slot->bounce = (char *)aligned_memory(up(options_.block, 1 << 16));
        slot->memory = slot->bounce;
        if (slot->bounce == nullptr)
            direct = false, slot->memory = slot->wanted;
        else if (slot->write)
            memcpy(slot->bounce, slot->wanted, (size_t)slot->bytes);
    }
    if (!direct && !open_door(part, false)) return false;
    slot->is_direct = direct;
    slot->door = direct ? file.direct : file.cached;
    engine_->start(slot);
    return true;
}

bool Worker::settle(Slot *slot) {
    Part *part = slot->part;
    const Result result = slot->result;
    bool again = false;
    if (result > 0) {
        const int64_t bytes = smaller(result, slot->bytes);
        if (!slot->write && slot->memory != slot->wanted)
            memcpy(slot->wanted, slot->memory, (size_t)bytes);
        queue_->moved(part, bytes);
        slot->wanted += bytes;
        slot->offset += bytes;
        slot->bytes -= bytes;
        again = slot->bytes != 0;  // a short transfer: ask for the rest
    } else {
        const int error = (int)-result;
        if (result < 0 && is_again(error)) {
            again = true;
        } else if (result < 0 && slot->is_direct && is_misaligned(error)) {
            slot->by_cache = again = true;
        } else if (!slot->write && (result == 0 || is_end(error))) {
            queue_->fail(part, kEndOfFile, 0, slot->offset, slot->bytes);
        } else {
            queue_->fail(part, kFailed, result == 0 ? error_io() : error, slot->offset,
                         slot->bytes);
        }
    }
    if (again && !queue_->hopeless(part) && send(slot)) return false;
    --part->under_way;
    if (part != part_ && part->under_way == 0) leave(part);
    return true;
}

void Worker::leave(Part *part) {
    close_doors(&part->file);
    queue_->retire(part);
}

}  // namespace io
}  // namespace ds
