// SPDX-License-Identifier: Apache-2.0
// Files on Linux and macOS.
#if !defined(_WIN32)
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

namespace ds {
namespace io {

namespace {

int open_retry(const char *path, int flags) {
    int fd;
    do fd = open(path, flags | O_CLOEXEC, 0666);
    while (fd < 0 && errno == EINTR);
    return fd;
}

#if defined(O_DIRECT)
// What the kernel says about direct transfers on this file (since 6.1); 0 where it says nothing.
void ask_alignment(int fd, File *file) {
#if defined(SYS_statx)
    // struct statx and its two last fields, newer than many headers.
    uint32_t raw[64] = {0};
    const unsigned kAlign = 0x2000, kEmptyPath = 0x1000;
    if (syscall(SYS_statx, fd, "", kEmptyPath, kAlign, raw) != 0 || !(raw[0] & kAlign)) return;
    const uint32_t memory = raw[152 / 4], offset = raw[156 / 4];
    if (offset == 0) file->no_direct = true;
    if (memory > file->memory_align) file->memory_align = memory;
    if (offset > file->file_align) file->file_align = offset;
#else
    (void)fd;
    (void)file;
#endif
}

int direct_flag() { return O_DIRECT; }
#else
int direct_flag() { return 0; }
#endif

// The caller's descriptor leads to the file itself, whatever became of its name.
int reopen(const Target &target, int flags) {
    if (target.path != nullptr) return open_retry((const char *)target.path, flags);
    // A new door gives no right that the descriptor does not.
    const int mode = fcntl((int)target.given, F_GETFL) & O_ACCMODE;
    if (mode != O_RDWR && mode != (target.write ? O_WRONLY : O_RDONLY)) {
        errno = EBADF;
        return -1;
    }
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", (int)target.given);
    return open_retry(link, flags & ~O_CREAT);
}

bool is_direct(int64_t fd) {
    const int flags = fcntl((int)fd, F_GETFL);
    return flags >= 0 && direct_flag() != 0 && (flags & direct_flag()) != 0;
}

}  // namespace

int open_door(File *file, const Target &target, bool direct) {
    if ((direct ? file->direct : file->cached) != File::kClosed) return 0;
    const int flags = target.write ? O_WRONLY | O_CREAT : O_RDONLY;
    if (!direct) {
        int fd;
        if (target.path == nullptr && !is_direct(target.given))
            fd = fcntl((int)target.given, F_DUPFD_CLOEXEC, 0);
        else
            fd = reopen(target, flags);
        if (fd < 0) return errno;
        file->cached = fd;
        return 0;
    }
#if defined(O_DIRECT)
    // [Note: no page of two doors] Whole pages through the direct door, the rest through the other: the kernel keeps
    // both coherent as long as no cached page is written by both.
    const long page = sysconf(_SC_PAGESIZE);
    if (page > (long)file->file_align) file->file_align = (uint32_t)page;
    const int fd = reopen(target, flags | O_DIRECT);
    if (fd < 0) {
        // EINVAL: the file system has no such door. Anything else comes again from the other one.
        file->no_direct = true;
        return 0;
    }
    ask_alignment(fd, file);
    if (file->no_direct)
        close(fd);
    else
        file->direct = fd;
#else
    file->no_direct = true;
#endif
    return 0;
}

void close_doors(File *file) {
    if (file->direct != File::kClosed) close((int)file->direct);
    if (file->cached != File::kClosed) close((int)file->cached);
    file->direct = file->cached = File::kClosed;
}

int reserve(File *file, const Target &target, int64_t end) {
#if defined(__linux__)
    int error = file->no_direct || end < file->file_align ? 0 : open_door(file, target, true);
    if (error == 0 && file->direct == File::kClosed) error = open_door(file, target, false);
    if (error != 0) return error;
    const int fd = (int)(file->direct != File::kClosed ? file->direct : file->cached);
    struct stat facts;
    if (fstat(fd, &facts) != 0 || !S_ISREG(facts.st_mode) || facts.st_size >= end) return 0;
    int status;
    do status = fallocate(fd, 0, facts.st_size, end - facts.st_size);
    while (status != 0 && errno == EINTR);
    // Many file systems cannot; those that can and have no room say so.
    if (status != 0 && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)) return errno;
#else
    (void)file;
    (void)target;
    (void)end;
#endif
    return 0;
}

Result transfer(intptr_t door, bool write, void *memory, int64_t bytes, int64_t offset) {
    const ssize_t done = write ? pwrite((int)door, memory, (size_t)bytes, (off_t)offset)
                               : pread((int)door, memory, (size_t)bytes, (off_t)offset);
    return done < 0 ? -(Result)errno : (Result)done;
}

int64_t copy_given(int64_t given, int *error) {
    const int fd = fcntl((int)given, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) *error = errno;
    return fd;
}

void close_given(int64_t given) { close((int)given); }

void *copy_path(const void *path) { return strdup((const char *)path); }

bool is_again(int error) { return error == EINTR || error == EAGAIN; }
bool is_misaligned(int error) { return error == EINVAL; }
bool is_end(int) { return false; }
int error_no_memory() { return ENOMEM; }
int error_io() { return EIO; }

}  // namespace io
}  // namespace ds
#endif
