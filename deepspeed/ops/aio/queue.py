# SPDX-License-Identifier: Apache-2.0
"""`FileQueue`: reads and writes of tensors that run beside the caller, safe for the memory they use."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from deepspeed.ops.aio.library import (
    CANCELLED,
    DONE,
    END_OF_FILE,
    NativeQueue,
    Options,
    Outcome,
    Request,
    backends,
    system_error,
)
from deepspeed.ops.aio.plain import PlainQueue
from deepspeed.utils import env
from deepspeed.utils.errors import explain

FileName = str | os.PathLike[str] | int


class _Flight(NamedTuple):
    """What a request under way needs: the tensor (kept alive by this), and what to do once it has arrived."""

    request: Request
    memory: Tensor
    arrived: Callable[[], None] | None


class FileQueue:
    """Reads and writes of whole tensors at places in files, many at a time.

    Requests run side by side and in no order: wait for a write before reading the same bytes. A tensor is used
    until its request is over, and is kept alive so long; the caller must not change what is being written or look
    at what is being read. Any contiguous dtype and shape; offsets, sizes and addresses need no alignment. Tensors
    of a GPU travel through a page-locked copy.

    Args:
        options: block size, depth and the like; see `Options`.
        backend: "auto", "io_uring", "iocp", "threads" or "python"; None reads DS_AIO_BACKEND.

    Raises:
        ValueError: an option is out of its range, or the backend does not work here.

    Example:
        >>> with FileQueue() as queue:
        ...     ticket = queue.submit_write("weights.bin", 0, torch.ones(4))
        ...     queue.wait(ticket)
        16
    """

    def __init__(self, options: Options | None = None, backend: str | None = None) -> None:
        self.options = check_options(options or Options())
        self._queue = _open_queue(self.options, backend)
        self._flights: dict[int, _Flight] = {}
        self._lock = threading.Condition()
        self._waiting = 0  # threads inside the queue
        self._closing = False
        self._pid = os.getpid()
        # Also at exit: the workers must not outlive the interpreter's memory.
        self._finalizer = weakref.finalize(
            self, _close_queue, self._queue, self._flights, self._pid
        )

    @property
    def backend(self) -> str:
        """The backend in use: "io_uring", "iocp", "threads" or "python"."""
        return self._queue.backend

    @property
    def pending(self) -> tuple[int, ...]:
        """Tickets that were not waited for yet, oldest first."""
        with self._lock:
            return tuple(self._flights)

    def submit_read(self, path: FileName, offset: int, tensor: Tensor) -> int:
        """Begin to fill a tensor from a file, beginning at byte `offset`; returns the ticket to wait by.

        Raises:
            TypeError, ValueError: a bad path, offset or tensor.
            OSError: the system refuses at once; later failures are raised by `wait`.
        """
        check_tensor(tensor)
        if tensor.device.type == "cpu":
            return self._submit(False, path, offset, tensor, None)
        host = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda, device="cpu"
        )
        return self._submit(False, path, offset, host, lambda: _copy(host, tensor))

    def submit_write(self, path: FileName, offset: int, tensor: Tensor) -> int:
        """Begin to write a tensor into a file at byte `offset`; returns the ticket to wait by.

        A file that is not there is made; one that is there keeps its other bytes. The descriptor of an open file
        does in place of a path; its position neither counts nor changes.

        Raises:
            TypeError, ValueError: a bad path, offset or tensor.
            OSError: the system refuses at once; later failures are raised by `wait`.
        """
        check_tensor(tensor)
        return self._submit(True, path, offset, tensor.detach().to("cpu"), None)

    def wait(self, ticket: int) -> int:
        """Wait until a request is over; returns its bytes.

        Raises:
            OSError: it failed; the message names the file, the place and the cause. What it was to read is undefined.
            ValueError: no request has that ticket (it may have been waited for already).
        """
        with self._lock:
            self._check_usable()
            flight = self._flights.get(ticket)
            if flight is None:
                raise ValueError(explain("no request has this ticket", got=ticket))
            self._waiting += 1
        try:
            outcome = self._queue.wait(ticket)
            with self._lock:
                self._flights.pop(ticket, None)
        finally:
            with self._lock:
                self._waiting -= 1
                self._lock.notify_all()
        if outcome.state != DONE:
            raise _failure(flight.request, outcome)
        if flight.arrived is not None:
            flight.arrived()
        return flight.request.nbytes

    def wait_all(self) -> int:
        """Wait for every request; returns how many there were.

        Raises:
            OSError: the first that failed, after all are over.
        """
        tickets = self.pending
        failures = []
        for ticket in tickets:
            try:
                self.wait(ticket)
            except OSError as failure:
                failures.append(failure)
        if len(failures) > 1:
            failures[0].strerror = f"{failures[0].strerror} (and {len(failures) - 1} more failed)"
        if failures:
            raise failures[0]
        return len(tickets)

    def close(self) -> None:
        """Drop the requests that have not begun and wait for those that have; closing twice is fine."""
        with self._lock:
            # What other threads wait for now comes to its end first; they begin no further wait.
            self._closing = True
            self._lock.wait_for(lambda: self._waiting == 0)
            if self._finalizer.alive and os.getpid() == self._pid:
                self._queue.close()
            self._finalizer()

    def __enter__(self) -> FileQueue:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(
        self,
        write: bool,
        path: FileName,
        offset: int,
        tensor: Tensor,
        arrived: Callable[[], None] | None,
    ) -> int:
        check_tensor(tensor)
        file = path if isinstance(path, int) else os.fspath(path)
        if not isinstance(file, (str, int)) or isinstance(file, bool):
            raise TypeError(explain("not a file's name", got=path, expected="a path or descriptor"))
        if offset < 0:
            raise ValueError(explain("a place in a file cannot be negative", got=offset))
        nbytes = tensor.numel() * tensor.element_size()
        request = Request(write, file, offset, tensor.data_ptr(), nbytes)
        with self._lock:
            self._check_usable()
            ticket = self._queue.submit(request)
            self._flights[ticket] = _Flight(request, tensor, arrived)
        return ticket

    def _check_usable(self) -> None:
        if self._closing:
            raise ValueError("the file queue is closed")
        if os.getpid() != self._pid:
            raise RuntimeError(
                explain(
                    "a file queue does not survive a fork",
                    fix="Make a new one in the child process.",
                )
            )


def check_options(options: Options) -> Options:
    """Return the options, their values as plain numbers.

    Raises:
        ValueError: one is out of its range.
    """
    ranges = {
        "block_size": (512, 1 << 30),
        "queue_depth": (1, 4096),
        "intra_op_parallelism": (1, 256),
    }
    for name, (least, most) in ranges.items():
        value = getattr(options, name)
        if not least <= value <= most:
            raise ValueError(
                explain(f"{name} of file I/O", got=value, expected=f"{least} to {most}")
            )
    return Options(
        int(options.block_size),
        int(options.queue_depth),
        bool(options.single_submit),
        bool(options.overlap_events),
        int(options.intra_op_parallelism),
        bool(options.direct),
    )


def check_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor if its bytes lie in a row.

    Raises:
        TypeError: it is no tensor, or has no bytes of its own.
        ValueError: it is not contiguous.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(explain("file I/O moves tensors", got=type(tensor).__name__))
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise TypeError(
            explain(
                "file I/O needs a tensor with plain memory",
                got=f"layout {tensor.layout}, device {tensor.device}",
                expected="a strided tensor of a device",
            )
        )
    if not tensor.is_contiguous():
        raise ValueError(
            explain(
                "file I/O needs a contiguous tensor",
                got=f"shape {tuple(tensor.shape)} with strides {tensor.stride()}",
                fix="Write tensor.contiguous(), or read into a contiguous one and copy.",
            )
        )
    return tensor


def _copy(source: Tensor, target: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _open_queue(options: Options, backend: str | None) -> NativeQueue | PlainQueue:
    chosen = (backend or env.DS_AIO_BACKEND.get() or "auto").strip().lower()
    here = backends()
    if chosen not in ("auto", *here):
        raise ValueError(
            explain("file I/O cannot use this backend here", got=chosen, expected=", ".join(here))
        )
    if chosen == "python" or here == ("python",):
        return PlainQueue(options)
    return NativeQueue(options, chosen)


def _close_queue(queue: NativeQueue | PlainQueue, flights: dict[int, _Flight], owner: int) -> None:
    # A child of fork has neither the threads nor sound locks; the memory is the parent's business.
    if os.getpid() != owner:
        return
    if isinstance(queue, PlainQueue):
        queue.abandon(dict(flights))
    else:
        queue.close()
    flights.clear()


def _failure(request: Request, outcome: Outcome) -> OSError:
    verb = "writing" if request.write else "reading"
    what = f"{verb} {request.nbytes} bytes at offset {request.offset}"
    name = request.file if isinstance(request.file, str) else f"descriptor {request.file}"
    if outcome.state == END_OF_FILE:
        size = Path(name).stat().st_size if Path(name).is_file() else outcome.offset
        return OSError(errno.EIO, f"{what}: the file ends at byte {size}", name)
    if outcome.state == CANCELLED:
        return OSError(errno.ECANCELED, f"{what}: cancelled after {outcome.moved} bytes", name)
    if (outcome.offset, outcome.nbytes) != (request.offset, request.nbytes):
        what += f", at {outcome.nbytes} bytes from offset {outcome.offset}"
    return system_error(outcome.error, what, request.file)
