// SPDX-License-Identifier: Apache-2.0
// One open file behind two doors: one bypasses the system's page cache, one takes any offset and length.
#pragma once

#include <stdint.h>

namespace ds {
namespace io {

// Result of a transfer: bytes >= 0, or minus the system's error number.
typedef int64_t Result;

// How the owner of a request names its file.
struct Target {
    const void *path;  // null-terminated: bytes on POSIX, UTF-16 on Windows; null: `given` is used
    int64_t given;     // a descriptor (POSIX) or a HANDLE (Windows), ours until close_target
    bool write;
};

struct File {
    static constexpr intptr_t kClosed = -1;

    intptr_t direct = kClosed;
    intptr_t cached = kClosed;
    bool no_direct = false;     // the file system or the caller's descriptor forbids the direct door
    uint32_t file_align = 4096;  // offsets and lengths of direct transfers
    uint32_t memory_align = 512;
};

// Opens the door if it is closed and returns 0, or the system's error. A direct door that cannot be had is no error:
// `no_direct` is set, and the caller takes the other one. A file to write is made when it is not there.
int open_door(File *file, const Target &target, bool direct);

void close_doors(File *file);

// Before the first write, and before a door is opened: makes room up to `end`, so that a full disk shows early
// and parallel writes need not grow the file. Never shortens it. Returns 0 or the system's error.
int reserve(File *file, const Target &target, int64_t end);

// One transfer in the calling thread.
Result transfer(intptr_t door, bool write, void *memory, int64_t bytes, int64_t offset);

// A private copy of a descriptor or HANDLE, or -1 with the error in *error; and its end.
int64_t copy_given(int64_t given, int *error);
void close_given(int64_t given);

// A private copy of a path, to be given to free(); null without memory.
void *copy_path(const void *path);

// Errors that are answered, not reported.
bool is_again(int error);      // try the same once more
bool is_misaligned(int error);  // the direct door refuses this piece
bool is_end(int error);         // reading begins behind the end of the file
int error_no_memory();
int error_io();

}  // namespace io
}  // namespace ds
