// SPDX-License-Identifier: Apache-2.0
// One thread of a queue: cuts parts into pieces and keeps as many under way as the depth allows.
#pragma once

#include "queue.h"

namespace ds {
namespace io {

class Worker {
public:
    Worker(Queue *queue, const Options &options);
    ~Worker();
    void run();

private:
    void fill();
    bool open(Part *part);
    bool open_door(Part *part, bool direct);
    // Gives the slot the part's next piece.
    void cut(Part *part, Slot *slot);
    // Sends what is left of the slot's piece; false if no door is open to it (the request has failed then).
    bool send(Slot *slot);
    // Returns true when the slot is free again.
    bool settle(Slot *slot);
    void leave(Part *part);

    Queue *queue_;
    const Options options_;
    std::unique_ptr<Engine> engine_;
    std::vector<Slot> slots_;
    std::vector<Slot *> free_, finished_;
    Part *part_ = nullptr;  // the one that pieces are cut from
};

}  // namespace io
}  // namespace ds
