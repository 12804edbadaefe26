// SPDX-License-Identifier: Apache-2.0
// Overlapped transfers of Windows, collected at a completion port.
#include "engine.h"

#if defined(_WIN32)
#include <stddef.h>
#include <string.h>
#include <windows.h>

#include <new>

namespace ds {
namespace io {

namespace {

static_assert(sizeof(OVERLAPPED) <= sizeof(Slot::state), "the slot keeps it");

class IocpEngine : public Engine {
public:
    explicit IocpEngine(uint32_t depth) : depth_(depth) {
        failed_ = new (std::nothrow) Slot *[depth];
        port_ = CreateIoCompletionPort(INVALID_HANDLE_VALUE, nullptr, 0, 1);
    }

    ~IocpEngine() override {
        if (port_ != nullptr) CloseHandle(port_);
        delete[] failed_;
    }

    bool usable() const { return port_ != nullptr && failed_ != nullptr; }

    uint32_t depth() const override { return depth_; }

    int attach(intptr_t door) override {
        HANDLE joined = CreateIoCompletionPort((HANDLE)door, port_, 0, 0);
        return joined != nullptr ? 0 : (int)GetLastError();
    }

    void start(Slot *slot) override {
        OVERLAPPED *at = new (slot->state) OVERLAPPED;
        memset(at, 0, sizeof *at);
        at->Offset = (DWORD)slot->offset;
        at->OffsetHigh = (DWORD)(slot->offset >> 32);
        HANDLE door = (HANDLE)slot->door;
        const BOOL started =
            slot->write ? WriteFile(door, slot->memory, (DWORD)slot->bytes, nullptr, at)
                        : ReadFile(door, slot->memory, (DWORD)slot->bytes, nullptr, at);
        if (started) return;  // it is over already, and waits at the port all the same
        const DWORD error = GetLastError();
        if (error == ERROR_IO_PENDING) return;
        slot->result = -(Result)error;
        failed_[failures_++] = slot;
    }

    uint32_t finish(Slot **done, uint32_t capacity) override {
        uint32_t count = 0;
        while (failures_ != 0 && count < capacity) done[count++] = failed_[--failures_];
        while (count < capacity) {
            DWORD bytes = 0;
            ULONG_PTR key = 0;
            OVERLAPPED *at = nullptr;
            const BOOL good =
                GetQueuedCompletionStatus(port_, &bytes, &key, &at, count == 0 ? INFINITE : 0);
            if (at == nullptr) break;
            Slot *slot = (Slot *)((char *)at - offsetof(Slot, state));
            slot->result = good ? (Result)bytes : -(Result)GetLastError();
            done[count++] = slot;
        }
        return count;
    }

private:
    uint32_t depth_;
    HANDLE port_ = nullptr;
    Slot **failed_ = nullptr;  // those that did not even start
    uint32_t failures_ = 0;
};

}  // namespace

Engine *make_iocp_engine(uint32_t depth) {
    IocpEngine *engine = new (std::nothrow) IocpEngine(depth);
    if (engine != nullptr && engine->usable()) return engine;
    delete engine;
    return nullptr;
}

}  // namespace io
}  // namespace ds
#else
ds::io::Engine *ds::io::make_iocp_engine(uint32_t) { return nullptr; }
#endif
