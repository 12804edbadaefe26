// SPDX-License-Identifier: Apache-2.0
// Worker threads that sleep between calls. Each thread starts on its own contiguous part (long streams suit the
// memory's prefetchers) and then helps the others, so that one slow core does not hold up all.
#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace {

enum { kMaxThreads = 256 };

struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
};

// Where the part of a thread ends.
int64_t part_end(uint32_t index, int64_t count, uint32_t threads) {
    return count * (index + 1) / threads;
}

struct Job {
    ds::Task task;
    void *context;
    uint32_t parts;
    Part part[kMaxThreads];

    void prepare(ds::Task t, void *c, int64_t count, uint32_t threads) {
        task = t;
        context = c;
        parts = threads;
        int64_t begin = 0;
        for (uint32_t i = 0; i < threads; ++i) {
            part[i].next.store(begin, std::memory_order_relaxed);
            part[i].end = begin = part_end(i, count, threads);
        }
    }

    void run(uint32_t self) {
        for (uint32_t k = 0; k < parts; ++k) {
            Part &mine = part[(self + k) % parts];
            for (;;) {
                const int64_t i = mine.next.fetch_add(1, std::memory_order_relaxed);
                if (i >= mine.end) break;
                task(context, i);
            }
        }
    }
};

class Pool {
public:
    // Returns false when another thread is inside.
    bool run(ds::Task task, void *context, int64_t count, uint32_t threads) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        threads = grow(threads);
        job_.prepare(task, context, count, threads);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            wanted_ = threads - 1;
            ++round_;
        }
        wake_.notify_all();
        job_.run(0);
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // a worker that has not woken yet finds nothing left: do not wait for it
        done_.wait(lock, [this] { return busy_ == 0; });
        return true;
    }

private:
    // Starts workers up to `threads`, itself included; returns how many threads there are to use.
    uint32_t grow(uint32_t threads) {
        if (threads > kMaxThreads) threads = kMaxThreads;
        while (workers_ + 1 < threads) {
            try {
                std::thread([this, index = workers_ + 1, round = round_] {
                    work(index, round);
                }).detach();
            } catch (const std::system_error &) {
                break;  // the system gives no more threads: do with what there is
            }
            ++workers_;
        }
        return workers_ + 1 < threads ? workers_ + 1 : threads;
    }

    void work(uint32_t index, uint64_t seen) {
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                if (index > wanted_) continue;
                ++busy_;
            }
            job_.run(index);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_;  // held for a whole parallel_for
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    uint64_t round_ = 0;
    uint32_t wanted_ = 0;  // workers that may join the round
    uint32_t busy_ = 0;    // those that did
    uint32_t workers_ = 0;
    Job job_;
};

// [Note: a pool is never destroyed]
// Its threads may still sleep in it when the process exits, and on Windows they are already killed when destructors
// run, so joining them would hang. A child of fork has none of the threads, and may have inherited a locked mutex: it
// leaves the old pool alone and makes its own.
std::atomic<Pool *> g_pool{nullptr};

#if !defined(_WIN32)
void forget_pool() { g_pool.store(nullptr, std::memory_order_relaxed); }

void watch_forks() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
}
#else
void watch_forks() {}
#endif

Pool *pool() {
    Pool *current = g_pool.load(std::memory_order_acquire);
    if (current != nullptr) return current;
    watch_forks();
    Pool *made = new (std::nothrow) Pool;
    if (made == nullptr) return nullptr;
    if (g_pool.compare_exchange_strong(current, made)) return made;
    delete made;  // another thread was first; this one has started no workers
    return current;
}

}  // namespace

namespace ds {

int64_t mirrored(int64_t index, int64_t count, uint32_t threads) {
    if ((int64_t)threads > count) threads = (uint32_t)count;
    int64_t begin = 0;
    for (uint32_t i = 0; i < threads; ++i) {
        const int64_t end = part_end(i, count, threads);
        if (index < end) return begin + end - 1 - index;
        begin = end;
    }
    return begin + count - 1 - index;  // no threads: the calling one alone
}

void parallel_for(Task task, void *context, int64_t count, uint32_t threads) {
    if ((int64_t)threads > count) threads = (uint32_t)count;
    if (threads > 1) {
        Pool *shared = pool();
        if (shared != nullptr && shared->run(task, context, count, threads)) return;
    }
    for (int64_t i = 0; i < count; ++i) task(context, i);
}

}  // namespace ds
