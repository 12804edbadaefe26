// SPDX-License-Identifier: Apache-2.0
// A mutex and a condition. On Windows they are the system's own: those of MinGW's C++ library can hang when a condition
// on which somebody waited with a time limit is destroyed.
#pragma once

#include <condition_variable>
#include <mutex>

namespace ds {
namespace io {

#if defined(_WIN32)

class Mutex {
public:
    void lock();
    void unlock();

private:
    friend class Condition;
    void *state_ = nullptr;  // an SRWLOCK
};

class Condition {
public:
    // At most so long, if not negative; may also return for no reason. False: the time is over.
    bool wait(std::unique_lock<Mutex> &lock, int milliseconds = -1);
    void notify_all();

private:
    void *state_ = nullptr;  // a CONDITION_VARIABLE
};

#else

typedef std::mutex Mutex;

class Condition {
public:
    bool wait(std::unique_lock<Mutex> &lock, int milliseconds = -1);
    void notify_all() { condition_.notify_all(); }

private:
    std::condition_variable condition_;
};

#endif

}  // namespace io
}  // namespace ds
