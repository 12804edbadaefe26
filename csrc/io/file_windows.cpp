// SPDX-License-Identifier: Apache-2.0
// Files on Windows. Every door is overlapped, so that one thread can have many transfers under way.
#if defined(_WIN32)
#include "file.h"

#include <stdlib.h>
#include <string.h>
#include <wchar.h>
#include <windows.h>

namespace ds {
namespace io {

namespace {

enum { kShare = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE };

HANDLE open_path(const Target &target, DWORD flags) {
    const DWORD access = target.write ? GENERIC_WRITE : GENERIC_READ;
    const DWORD how = target.write ? OPEN_ALWAYS : OPEN_EXISTING;
    // Someone else makes the file at this moment (see reserve): it is free again at once.
    for (int tries = 0;; ++tries) {
        HANDLE made = CreateFileW((const wchar_t *)target.path, access, kShare, nullptr, how,
                                  flags | FILE_FLAG_OVERLAPPED, nullptr);
        if (made != INVALID_HANDLE_VALUE || GetLastError() != ERROR_SHARING_VIOLATION ||
            tries == 200)
            return made;
        Sleep(1);
    }
}

// A transfer of nothing, where the handle stands: refused like any other.
bool forbidden(HANDLE given, bool write) {
    LARGE_INTEGER here;
    here.QuadPart = 0;
    SetFilePointerEx(given, here, &here, FILE_CURRENT);
    OVERLAPPED at;
    memset(&at, 0, sizeof at);
    at.Offset = here.LowPart;
    at.OffsetHigh = (DWORD)here.HighPart;
    char nothing = 0;
    DWORD done = 0;
    const BOOL good = write ? WriteFile(given, &nothing, 0, &done, &at)
                            : ReadFile(given, &nothing, 0, &done, &at);
    return !good && GetLastError() == ERROR_ACCESS_DENIED;
}

HANDLE open_given(const Target &target, DWORD flags) {
    // Opening anew would give rights that the handle does not have.
    if (forbidden((HANDLE)(intptr_t)target.given, target.write)) {
        SetLastError(ERROR_ACCESS_DENIED);
        return INVALID_HANDLE_VALUE;
    }
    const DWORD access = target.write ? GENERIC_WRITE : GENERIC_READ;
    return ReOpenFile((HANDLE)(intptr_t)target.given, access, kShare, flags | FILE_FLAG_OVERLAPPED);
}

struct Event {
    HANDLE handle = CreateEventW(nullptr, TRUE, FALSE, nullptr);
    ~Event() {
        if (handle != nullptr) CloseHandle(handle);
    }
};

}  // namespace

int open_door(File *file, const Target &target, bool direct) {
    intptr_t &door = direct ? file->direct : file->cached;
    if (door != File::kClosed) return 0;
    const DWORD flags = direct ? FILE_FLAG_NO_BUFFERING : 0;
    HANDLE made = target.path != nullptr ? open_path(target, flags) : open_given(target, flags);
    if (made != INVALID_HANDLE_VALUE) {
        door = (intptr_t)made;
        // No sector is larger; and memory on a page is right for every driver.
        file->memory_align = 4096;
        return 0;
    }
    if (!direct) return (int)GetLastError();
    file->no_direct = true;  // if it was another cause, it comes again from the other door
    return 0;
}

void close_doors(File *file) {
    if (file->direct != File::kClosed) CloseHandle((HANDLE)file->direct);
    if (file->cached != File::kClosed) CloseHandle((HANDLE)file->cached);
    file->direct = file->cached = File::kClosed;
}

// Setting the end of a file can also shorten it, if another writer was faster. So only a file that is not there yet is
// given its size, by its one maker, while nobody else can open it.
int reserve(File *, const Target &target, int64_t end) {
    const int64_t kWorthIt = 1 << 20;
    if (target.path == nullptr || end < kWorthIt) return 0;
    HANDLE made = CreateFileW((const wchar_t *)target.path, GENERIC_WRITE, 0, nullptr, CREATE_NEW,
                              FILE_ATTRIBUTE_NORMAL, nullptr);
    if (made == INVALID_HANDLE_VALUE) return 0;  // it is there, or opening it will tell
    FILE_END_OF_FILE_INFO size;
    size.EndOfFile.QuadPart = end;
    int error = 0;
    if (!SetFileInformationByHandle(made, FileEndOfFileInfo, &size, sizeof size))
        error = (int)GetLastError();
    CloseHandle(made);
    return error == ERROR_DISK_FULL || error == ERROR_HANDLE_DISK_FULL ? error : 0;
}

Result transfer(intptr_t door, bool write, void *memory, int64_t bytes, int64_t offset) {
    thread_local Event event;
    OVERLAPPED at;
    memset(&at, 0, sizeof at);
    at.Offset = (DWORD)offset;
    at.OffsetHigh = (DWORD)(offset >> 32);
    at.hEvent = event.handle;
    HANDLE handle = (HANDLE)door;
    const BOOL started = write ? WriteFile(handle, memory, (DWORD)bytes, nullptr, &at)
                               : ReadFile(handle, memory, (DWORD)bytes, nullptr, &at);
    if (!started && GetLastError() != ERROR_IO_PENDING) return -(Result)GetLastError();
    DWORD done = 0;
    if (!GetOverlappedResult(handle, &at, &done, TRUE)) return -(Result)GetLastError();
    return done;
}

int64_t copy_given(int64_t given, int *error) {
    HANDLE copy = nullptr;
    HANDLE self = GetCurrentProcess();
    if (DuplicateHandle(self, (HANDLE)(intptr_t)given, self, &copy, 0, FALSE,
                        DUPLICATE_SAME_ACCESS))
        return (int64_t)(intptr_t)copy;
    *error = (int)GetLastError();
    return -1;
}

void close_given(int64_t given) { CloseHandle((HANDLE)(intptr_t)given); }

void *copy_path(const void *path) { return _wcsdup((const wchar_t *)path); }

bool is_again(int) { return false; }
bool is_misaligned(int error) { return error == ERROR_INVALID_PARAMETER; }
bool is_end(int error) { return error == ERROR_HANDLE_EOF; }
int error_no_memory() { return ERROR_NOT_ENOUGH_MEMORY; }
int error_io() { return ERROR_IO_DEVICE; }

}  // namespace io
}  // namespace ds
#endif
