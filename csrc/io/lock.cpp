// SPDX-License-Identifier: Apache-2.0
#include "lock.h"

#if defined(_WIN32)
#include <windows.h>

namespace ds {
namespace io {

static_assert(sizeof(SRWLOCK) == sizeof(void *) && sizeof(CONDITION_VARIABLE) == sizeof(void *),
              "both begin as null pointers");

void Mutex::lock() { AcquireSRWLockExclusive((SRWLOCK *)&state_); }
void Mutex::unlock() { ReleaseSRWLockExclusive((SRWLOCK *)&state_); }

bool Condition::wait(std::unique_lock<Mutex> &lock, int milliseconds) {
    const DWORD limit = milliseconds < 0 ? INFINITE : (DWORD)milliseconds;
    return SleepConditionVariableSRW((CONDITION_VARIABLE *)&state_,
                                     (SRWLOCK *)&lock.mutex()->state_, limit, 0) != 0;
}

void Condition::notify_all() { WakeAllConditionVariable((CONDITION_VARIABLE *)&state_); }

}  // namespace io
}  // namespace ds
#else
#include <chrono>

namespace ds {
namespace io {

bool Condition::wait(std::unique_lock<Mutex> &lock, int milliseconds) {
    if (milliseconds < 0) {
        condition_.wait(lock);
        return true;
    }
    const auto limit = std::chrono::milliseconds(milliseconds);
    return condition_.wait_for(lock, limit) == std::cv_status::no_timeout;
}

}  // namespace io
}  // namespace ds
#endif
