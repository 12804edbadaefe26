// SPDX-License-Identifier: Apache-2.0
// A queue of reads and writes, served by worker threads; each worker moves pieces by an Engine.
#pragma once

#include <stdint.h>

#include <deque>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "engine.h"
#include "lock.h"

namespace ds {
namespace io {

enum Backend { kAuto = 0, kThreads = 1, kUring = 2, kIocp = 3 };

struct Options {
    int32_t backend;
    int64_t block;     // bytes of a piece
    uint32_t depth;    // pieces under way per worker
    uint32_t workers;  // threads; a request is cut into as many parts
    bool single;       // tell the kernel of each piece at once, not of several together
    bool overlap;      // replace each finished piece at once, not when half of them are done
    bool direct;
};

enum State { kPending = 0, kDone = 1, kFailed = 2, kEndOfFile = 3, kCancelled = 4 };

struct Outcome {
    State state = kPending;
    int error = 0;           // the system's, for kFailed
    int64_t moved = 0;       // bytes of finished pieces
    int64_t bad_offset = 0;  // of the piece that failed
    int64_t bad_bytes = 0;
};

struct Request {
    Target target;
    void *path = nullptr;  // owned; target.path is this
    char *memory;
    int64_t offset, bytes;
    // Below: under the queue's mutex.
    Outcome outcome;
    uint32_t parts_left = 0;

    ~Request();
};

// A contiguous stretch of a request, served by one worker that opens the file for itself.
struct Part {
    std::shared_ptr<Request> request;
    int64_t begin, end;  // offsets in the file
    int64_t next;        // first byte that no piece has taken
    uint32_t under_way = 0;
    bool stopped = false;  // take no further pieces
    File file;
};

class Queue {
public:
    explicit Queue(const Options &options) : options_(options) {}
    // Drops what has not begun, waits for what has, and ends the workers.
    ~Queue();

    // Returns the number by which to wait for it, or -1 with *error.
    int64_t submit(const Target &target, int64_t offset, int64_t bytes, void *memory, int *error);

    // Waits up to `milliseconds` (< 0: as long as it takes). A state other than kPending forgets the ticket.
    // False: no such ticket.
    bool wait(int64_t ticket, int milliseconds, Outcome *outcome);

private:
    friend class Worker;

    bool start_workers();
    // The next part to serve; null when there is none, and if `patient` only once the queue closes.
    Part *take(bool patient);
    // The worker is through with the part (it is deleted).
    void retire(Part *part);
    void moved(Part *part, int64_t bytes);
    void fail(Part *part, State state, int error, int64_t offset, int64_t bytes);
    // True once the part's request has failed or the queue closes: no further piece is worth its while.
    bool hopeless(Part *part);

    const Options options_;
    Mutex mutex_;
    Condition work_, done_;
    std::deque<Part *> parts_;
    std::map<int64_t, std::shared_ptr<Request>> requests_;
    int64_t last_ticket_ = 0;
    bool closing_ = false;
    std::vector<std::thread> workers_;
};

// The backend that kAuto means here, asked of the system once.
int best_backend();

}  // namespace io
}  // namespace ds
