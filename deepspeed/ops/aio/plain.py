# SPDX-License-Identifier: Apache-2.0
"""The same queue in plain Python: what file I/O falls back to without the native library, and is compared with."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from io import FileIO

from deepspeed.ops.aio.library import (
    CANCELLED,
    DONE,
    END_OF_FILE,
    FAILED,
    Options,
    Outcome,
    Request,
)


class PlainQueue:
    """Requests served by Python threads through the page cache."""

    backend = "python"

    def __init__(self, options: Options) -> None:
        self._block = options.block_size
        threads = max(options.intra_op_parallelism, min(options.queue_depth, 8))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="file-io")
        self._futures: dict[int, Future[Outcome]] = {}
        self._closing = threading.Event()
        self._last = 0

    def submit(self, request: Request) -> int:
        """Begin a request; returns the ticket to wait by."""
        file = request.file
        if isinstance(file, int):
            # The caller may close its own before the request is over.
            request = request._replace(file=os.dup(file))
        self._last += 1
        self._futures[self._last] = self._pool.submit(self._serve, request)
        return self._last

    def wait(self, ticket: int) -> Outcome:
        """Wait until a request is over; its ticket is void then."""
        outcome = self._futures[ticket].result()
        del self._futures[ticket]
        return outcome

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        self._closing.set()
        wait(self._futures.values())
        self._pool.shutdown()

    def abandon(self, held: object) -> None:
        """Drop what has not begun, and let what has come to its end by itself; `held` is kept alive so long.

        For finalizers: the garbage collector may run them in any thread at any place, inside the start of a thread
        too, where waiting for another thread would never end.
        """
        self._closing.set()
        for future in list(self._futures.values()):
            future.add_done_callback(partial(_let_go, held))
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _serve(self, request: Request) -> Outcome:
        done = 0
        try:
            if self._closing.is_set():
                return Outcome(CANCELLED)
            with _open(request) as file:
                memory = (ctypes.c_char * request.nbytes).from_address(request.address or 1)
                view = memoryview(memory).cast("B")
                while done < request.nbytes:
                    piece = view[done : done + self._block]
                    moved = _move(file, request, piece, request.offset + done)
                    if not moved:
                        break
                    done += moved
                    if self._closing.is_set() and done < request.nbytes:
                        return Outcome(CANCELLED, moved=done)
        except OSError as error:
            return Outcome(
                FAILED, _system_code(error), done, request.offset + done, request.nbytes - done
            )
        if done < request.nbytes:
            return Outcome(END_OF_FILE, 0, done, request.offset + done, request.nbytes - done)
        return Outcome(DONE, moved=done)


def _let_go(held: object, future: Future[Outcome]) -> None:
    """Carries what a request uses to the request's end."""


def _move(file: FileIO, request: Request, piece: memoryview, offset: int) -> int | None:
    if isinstance(request.file, int) and hasattr(os, "preadv"):
        # The caller's descriptor shares its position with our copy.
        descriptor = file.fileno()
        if request.write:
            return os.pwrite(descriptor, piece, offset)
        return os.preadv(descriptor, [piece], offset)
    file.seek(offset)
    return file.write(piece) if request.write else file.readinto(piece)


def _system_code(error: OSError) -> int:
    """Return the error as the system numbers it: on Windows not as C does."""
    if sys.platform != "win32":
        return error.errno or errno.EIO
    by_errno = {errno.ENOENT: 2, errno.EACCES: 5, errno.ENOSPC: 112}
    return error.winerror or by_errno.get(error.errno or 0, 1117)


def _open(request: Request) -> FileIO:
    mode = "r+b" if request.write else "rb"
    if isinstance(request.file, int):
        return FileIO(request.file, mode)
    if not request.write:
        return FileIO(request.file, mode)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return FileIO(os.open(request.file, flags, 0o666), mode)
