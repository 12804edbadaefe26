# SPDX-License-Identifier: Apache-2.0
"""The native side of file I/O: its functions bound once, and one object a queue."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from typing import Any, NamedTuple

from deepspeed.ops import abi, native
from deepspeed.utils.errors import explain

BACKENDS = {"auto": 0, "threads": 1, "io_uring": 2, "iocp": 3}
_NAMES = {code: name for name, code in BACKENDS.items()}
# Longest time in one native call: between two, Python sees Ctrl-C.
_SLICE_MS = 200

PENDING, DONE, FAILED, END_OF_FILE, CANCELLED = range(5)


class Options(NamedTuple):
    """How a queue works.

    Attributes:
        block_size: bytes of one transfer.
        queue_depth: transfers under way per thread.
        single_submit: tell the system of each transfer by itself.
        overlap_events: replace each finished transfer at once, not when half of them are done.
        intra_op_parallelism: threads, which share each request.
        direct: bypass the page cache where the file system can.
    """

    block_size: int = 1 << 20
    queue_depth: int = 32
    single_submit: bool = False
    overlap_events: bool = True
    intra_op_parallelism: int = 1
    direct: bool = True


class Request(NamedTuple):
    """One transfer: a path (or a descriptor), a place in the file, and an address."""

    write: bool
    file: str | int
    offset: int
    address: int
    nbytes: int


class Outcome(NamedTuple):
    """How a request stands: one of the state codes, the system's error, and where it failed."""

    state: int
    error: int = 0
    moved: int = 0
    offset: int = 0
    nbytes: int = 0


class _Functions(NamedTuple):
    open: Any
    submit: Any
    wait: Any
    close: Any
    alloc: Any
    unlock: Any
    free: Any
    backends: Any


@lru_cache(maxsize=4)
def _bind(library: native.NativeLibrary) -> _Functions:
    def taking(structure: type[ctypes.Structure], symbol: str) -> Any:
        return library.function(symbol, ctypes.POINTER(structure))

    pointer = ctypes.c_void_p
    return _Functions(
        open=taking(abi.IoOpenArgs, "ds_io_open"),
        submit=taking(abi.IoSubmitArgs, "ds_io_submit"),
        wait=taking(abi.IoWaitArgs, "ds_io_wait"),
        close=library.function("ds_io_close", pointer, result=None),
        alloc=taking(abi.IoMemoryArgs, "ds_io_alloc"),
        unlock=library.function("ds_io_unlock", pointer, ctypes.c_int64, result=None),
        free=library.function("ds_io_free", pointer, result=None),
        backends=library.function("ds_io_backends", result=ctypes.c_char_p),
    )


def functions() -> _Functions | None:
    """Return the native functions, or None where there is no native library.

    Raises:
        native.NativeLibraryError: it is there and unusable.
    """
    library = native.opened()
    return None if library is None else _bind(library)


def backends() -> tuple[str, ...]:
    """Return the backends that work here, best first; "python" is there always."""
    bound = functions()
    names = bound.backends().decode("ascii").split() if bound is not None else []
    return (*names, "python")


class NativeQueue:
    """A queue of the native library; all memory must outlive its requests, and `close` be the last call.

    Args:
        options: how it works.
        backend: a key of BACKENDS.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(self, options: Options, backend: str) -> None:
        bound = functions()
        assert bound is not None
        self._bound = bound
        threads = options.intra_op_parallelism
        if backend == "threads" or (backend == "auto" and backends()[0] == "threads"):
            # Each such thread has one transfer under way; a few keep a disk busy.
            threads = max(threads, min(options.queue_depth, 8))
        args = abi.IoOpenArgs(
            size=ctypes.sizeof(abi.IoOpenArgs),
            backend=BACKENDS[backend],
            block_size=options.block_size,
            queue_depth=options.queue_depth,
            workers=threads,
            single_submit=options.single_submit,
            overlap_events=options.overlap_events,
            direct=options.direct,
        )
        if bound.open(ctypes.byref(args)):
            raise ValueError(explain("file I/O cannot be set up", got=native.last_error()))
        self.backend = _NAMES[args.backend]
        self._queue = args.queue

    def submit(self, request: Request) -> int:
        """Begin a request; returns the ticket to wait by.

        Raises:
            OSError: the system refuses (no memory, a closed descriptor).
        """
        args = abi.IoSubmitArgs(
            size=ctypes.sizeof(abi.IoSubmitArgs),
            write=request.write,
            queue=self._queue,
            offset=request.offset,
            bytes=request.nbytes,
            memory=request.address,
        )
        name = None
        if isinstance(request.file, int):
            args.given = _system_handle(request.file)
        else:
            name = ctypes.c_char_p(native_path(request.file))
            args.path = ctypes.cast(name, ctypes.c_void_p)
        if self._bound.submit(ctypes.byref(args)):
            if args.os_error:
                raise system_error(args.os_error, "the request was refused", request.file)
            raise ValueError(explain("bad request to a file", got=native.last_error()))
        return int(args.ticket)

    def wait(self, ticket: int) -> Outcome:
        """Wait until a request is over; its ticket is void then."""
        args = abi.IoWaitArgs(
            size=ctypes.sizeof(abi.IoWaitArgs),
            timeout_ms=_SLICE_MS,
            queue=self._queue,
            ticket=ticket,
        )
        while True:
            if self._bound.wait(ctypes.byref(args)):
                raise ValueError(explain("cannot wait for a request", got=native.last_error()))
            if args.state != PENDING:
                break
        return Outcome(args.state, args.os_error, args.moved, args.bad_offset, args.bad_bytes)

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        queue, self._queue = self._queue, None
        if queue is not None:
            self._bound.close(queue)


def native_path(path: str) -> bytes:
    """Return a path as the native library wants it, ended by a null (the second one is C's own)."""
    if "\0" in path:
        raise ValueError(explain("a path cannot hold a null character", got=repr(path)))
    if sys.platform != "win32":
        return os.fsencode(path)
    if len(path) > 240 and not path.startswith("\\\\"):
        path = "\\\\?\\" + os.path.abspath(path)
    return path.encode("utf-16-le", "surrogatepass") + b"\0"


def system_error(code: int, text: str, file: str | int) -> OSError:
    """Return the OSError of a system's error code, of the right subclass."""
    name = file if isinstance(file, str) else f"descriptor {file}"
    if sys.platform == "win32":
        words = ctypes.FormatError(code).strip().rstrip(".")
        return OSError(0, f"{text}: {words}", name, code)
    return OSError(code, f"{text}: {os.strerror(code)}", name)


def _system_handle(descriptor: int) -> int:
    if sys.platform != "win32":
        return descriptor
    import msvcrt

    return msvcrt.get_osfhandle(descriptor)
