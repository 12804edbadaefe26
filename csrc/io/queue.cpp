// SPDX-License-Identifier: Apache-2.0
#include "queue.h"

#include <stdlib.h>

#include <new>
#include <system_error>

#include "worker.h"

namespace ds {
namespace io {

Request::~Request() {
    if (target.given != -1) close_given(target.given);
    free(path);
}

Queue::~Queue() {
    {
        std::lock_guard<Mutex> lock(mutex_);
        closing_ = true;
    }
    work_.notify_all();
    for (std::thread &worker : workers_) worker.join();
    for (Part *part : parts_) delete part;
}

int64_t Queue::submit(const Target &target, int64_t offset, int64_t bytes, void *memory,
                      int *error) {
    std::shared_ptr<Request> request = std::make_shared<Request>();
    request->target = target;
    request->target.given = -1;
    if (target.path != nullptr) {
        request->target.path = request->path = copy_path(target.path);
        *error = request->path == nullptr ? error_no_memory() : 0;
    } else {
        *error = 0;
        request->target.given = copy_given(target.given, error);
    }
    if (*error != 0) return -1;
    request->memory = (char *)memory;
    request->offset = offset;
    request->bytes = bytes;

    // One part a worker, cut where blocks of the file begin.
    const int64_t first = offset - offset % options_.block;
    const int64_t blocks = (offset + bytes - first + options_.block - 1) / options_.block;
    int64_t count = blocks < options_.workers ? blocks : options_.workers;
    if (count < 1) count = 1;
    std::lock_guard<Mutex> lock(mutex_);
    if (!start_workers()) {
        *error = error_no_memory();
        return -1;
    }
    for (int64_t i = 0; i < count; ++i) {
        std::unique_ptr<Part> part(new Part);
        part->request = request;
        part->begin = i == 0 ? offset : first + blocks * i / count * options_.block;
        part->end = i + 1 == count ? offset + bytes
                                   : first + blocks * (i + 1) / count * options_.block;
        part->next = part->begin;
        parts_.push_back(part.get());
        part.release();
        ++request->parts_left;
    }
    requests_[++last_ticket_] = request;
    work_.notify_all();
    return last_ticket_;
}

bool Queue::wait(int64_t ticket, int milliseconds, Outcome *outcome) {
    std::unique_lock<Mutex> lock(mutex_);
    const auto found = requests_.find(ticket);
    if (found == requests_.end()) return false;
    const std::shared_ptr<Request> request = found->second;
    const auto over = [&] { return request->parts_left == 0; };
    // Another request's end may wake us; the caller asks again when the time is over.
    while (!over() && done_.wait(lock, milliseconds)) {
    }
    *outcome = request->outcome;
    if (!over()) {
        outcome->state = kPending;
        return true;
    }
    if (outcome->state == kPending) outcome->state = kDone;
    requests_.erase(ticket);
    return true;
}

bool Queue::start_workers() {
    while (workers_.size() < options_.workers) {
        try {
            workers_.emplace_back([this] {
                try {
                    Worker(this, options_).run();
                } catch (const std::bad_alloc &) {
                    // Nobody serves the queue then: say so to each request.
                    while (Part *part = take(true)) {
                        fail(part, kFailed, error_no_memory(), part->begin,
                             part->end - part->begin);
                        retire(part);
                    }
                }
            });
        } catch (const std::system_error &) {
            break;  // the system gives no more threads
        }
    }
    return !workers_.empty();
}

Part *Queue::take(bool patient) {
    std::unique_lock<Mutex> lock(mutex_);
    while (patient && !closing_ && parts_.empty()) work_.wait(lock);
    if (closing_ || parts_.empty()) return nullptr;
    Part *part = parts_.front();
    parts_.pop_front();
    return part;
}

void Queue::retire(Part *part) {
    {
        std::lock_guard<Mutex> lock(mutex_);
        Request &request = *part->request;
        if (closing_ && part->next < part->end && request.outcome.state == kPending)
            request.outcome.state = kCancelled;
        --request.parts_left;
    }
    done_.notify_all();
    delete part;
}

void Queue::moved(Part *part, int64_t bytes) {
    std::lock_guard<Mutex> lock(mutex_);
    part->request->outcome.moved += bytes;
}

void Queue::fail(Part *part, State state, int error, int64_t offset, int64_t bytes) {
    std::lock_guard<Mutex> lock(mutex_);
    Outcome &outcome = part->request->outcome;
    if (outcome.state != kPending) return;  // the first failure is the one to tell
    outcome.state = state;
    outcome.error = error;
    outcome.bad_offset = offset;
    outcome.bad_bytes = bytes;
}

bool Queue::hopeless(Part *part) {
    std::lock_guard<Mutex> lock(mutex_);
    return closing_ || part->request->outcome.state != kPending;
}

int best_backend() {
    static const int best = [] {
        const int kProbeDepth = 4;
        if (Engine *engine = make_uring_engine(kProbeDepth, false)) {
            delete engine;
            return (int)kUring;
        }
        if (Engine *engine = make_iocp_engine(kProbeDepth)) {
            delete engine;
            return (int)kIocp;
        }
        return (int)kThreads;
    }();
    return best;
}

}  // namespace io
}  // namespace ds
