// SPDX-License-Identifier: Apache-2.0
// How one worker moves pieces: by calls that wait, by io_uring, or by a completion port.
#pragma once

#include <stdint.h>

#include "file.h"

namespace ds {
namespace io {

struct Part;

// One transfer under way. The engine reads the first five members and sets `result`.
struct Slot {
    intptr_t door;
    bool write;
    void *memory;
    int64_t bytes;
    int64_t offset;
    Result result;

    // The queue's own: what the piece is for.
    Part *part;
    char *wanted;   // where the bytes belong; `memory` may be the bounce buffer instead
    char *bounce;   // aligned, made when first needed
    bool by_cache;  // the direct door refused this piece
    bool is_direct;

    // Room for the engine's state; large enough for an OVERLAPPED.
    alignas(16) unsigned char state[64];
};

class Engine {
public:
    virtual ~Engine() {}
    // Transfers that may be under way at once.
    virtual uint32_t depth() const = 0;
    // Called once for each opened door.
    virtual int attach(intptr_t) { return 0; }
    // Begins a transfer, at the latest when finish is called.
    virtual void start(Slot *slot) = 0;
    // Waits for at least one transfer and returns finished ones.
    virtual uint32_t finish(Slot **done, uint32_t capacity) = 0;
};

// Null where the system has no such thing. Each is used by the one thread that made it.
Engine *make_sync_engine();
Engine *make_uring_engine(uint32_t depth, bool single);
Engine *make_iocp_engine(uint32_t depth);

}  // namespace io
}  // namespace ds
