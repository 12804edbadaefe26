# SPDX-License-Identifier: Apache-2.0
"""What ``AsyncIOBuilder().load()`` returns: upstream's names and signatures over `FileQueue`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from deepspeed.ops.aio import buffers
from deepspeed.ops.aio.library import Options
from deepspeed.ops.aio.queue import FileName, FileQueue, check_options, check_tensor
from deepspeed.utils.errors import explain

# What upstream reports per thread; nothing here has to be aligned.
_SECTOR = 512
_COMPARED_AT_ONCE = 1 << 24


class aio_handle:
    """Reads and writes of whole tensors, at once or side by side.

    Args:
        block_size: bytes of one transfer.
        queue_depth: transfers under way per thread.
        single_submit: tell the system of each transfer by itself.
        overlap_events: replace each finished transfer at once, not when half of them are done.
        intra_op_parallelism: threads, which share each request.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        self._options = check_options(
            Options(block_size, queue_depth, single_submit, overlap_events, intra_op_parallelism)
        )
        self._made: FileQueue | None = None
        # ticket -> what to compare once it is over
        self._unchecked: dict[int, tuple[Tensor, FileName, int]] = {}

    def get_block_size(self) -> int:
        """Return the bytes of one transfer."""
        return self._options.block_size

    def get_queue_depth(self) -> int:
        """Return the transfers under way per thread."""
        return self._options.queue_depth

    def get_single_submit(self) -> bool:
        """Say whether each transfer is submitted by itself."""
        return self._options.single_submit

    def get_overlap_events(self) -> bool:
        """Say whether a finished transfer is replaced at once."""
        return self._options.overlap_events

    def get_intra_op_parallelism(self) -> int:
        """Return the threads that share a request."""
        return self._options.intra_op_parallelism

    def get_alignment(self) -> int:
        """Return the bytes of which sizes are best a multiple; other sizes are served too."""
        return _SECTOR * self._options.intra_op_parallelism

    def read(
        self, buffer: Tensor, filename: FileName, validate: bool = False, file_offset: int = 0
    ) -> int:
        """Fill the buffer from the file; returns 0.

        Args:
            buffer: contiguous tensor; its size says how much is read.
            filename: path.
            validate: read once more by plain means and compare.
            file_offset: first byte in the file.

        Raises:
            OSError: it failed, or the file ends too early; the message names file, offset and bytes.
        """
        self._now(False, buffer, filename, validate, file_offset)
        return 0

    def write(
        self, buffer: Tensor, filename: FileName, validate: bool = False, file_offset: int = 0
    ) -> int:
        """Write the buffer into the file, which is made if need be; returns 0. Arguments and errors as in `read`."""
        self._now(True, buffer, filename, validate, file_offset)
        return 0

    def pread(
        self,
        buffer: Tensor,
        filename: FileName,
        validate: bool = False,
        async_op: bool = False,
        file_offset: int = 0,
    ) -> int:
        """Read at once and return 1, or with `async_op` begin to and return 0; see `read`."""
        return self._any(False, buffer, filename, validate, async_op, file_offset)

    def pwrite(
        self,
        buffer: Tensor,
        filename: FileName,
        validate: bool = False,
        async_op: bool = False,
        file_offset: int = 0,
    ) -> int:
        """Write at once and return 1, or with `async_op` begin to and return 0; see `write`."""
        return self._any(True, buffer, filename, validate, async_op, file_offset)

    def sync_pread(self, buffer: Tensor, filename: FileName, file_offset: int = 0) -> int:
        """Read at once; returns 1. Errors as in `read`."""
        return self._any(False, buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer: Tensor, filename: FileName, file_offset: int = 0) -> int:
        """Write at once; returns 1. Errors as in `read`."""
        return self._any(True, buffer, filename, False, False, file_offset)

    def async_pread(self, buffer: Tensor, filename: FileName, file_offset: int = 0) -> int:
        """Begin to read and return 0; `wait` tells how it went. The buffer is in use until then."""
        return self._any(False, buffer, filename, False, True, file_offset)

    def async_pwrite(
        self,
        buffer: Tensor,
        filename: FileName | None = None,
        file_offset: int = 0,
        *,
        fd: int | None = None,
    ) -> int:
        """Begin to write and return 0; the buffer is in use until `wait`.

        Args:
            buffer: contiguous tensor, written as a whole.
            filename: path, or an open descriptor.
            file_offset: first byte in the file.
            fd: an open descriptor, in place of `filename`.

        Raises:
            TypeError: neither or both of the two are given.
        """
        if (filename is None) == (fd is None):
            raise TypeError(explain("async_pwrite needs a file", expected="one of filename and fd"))
        target = fd if filename is None else filename
        return self._any(True, buffer, cast(FileName, target), False, True, file_offset)

    def wait(self) -> int:
        """Wait for all requests that were begun; returns how many there were since the last wait.

        Raises:
            OSError: the first that failed, after all are over.
        """
        if self._made is None:
            return 0
        unchecked, self._unchecked = self._unchecked, {}
        count = self._made.wait_all()
        for buffer, filename, file_offset in unchecked.values():
            _compare(buffer, filename, file_offset)
        return count

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """Return a 1-D CPU tensor of the example's dtype, page-locked as far as the system allows."""
        return buffers.locked_tensor(num_elem, example_tensor.dtype)

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Unlock such a tensor; returns whether it was one. Its memory goes with its last tensor."""
        return buffers.unlock(tensor)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Say whether a tensor's memory is page-locked."""
        return buffers.is_locked(tensor)

    @property
    def _queue(self) -> FileQueue:
        # Threads only once there is something to do: many handles are made and only asked for their values.
        if self._made is None:
            self._made = FileQueue(self._options)
        return self._made

    def _begin(self, write: bool, buffer: Tensor, filename: FileName, offset: int) -> int:
        submit = self._queue.submit_write if write else self._queue.submit_read
        return submit(filename, offset, buffer)

    def _now(
        self, write: bool, buffer: Tensor, filename: FileName, validate: bool, offset: int
    ) -> None:
        self._queue.wait(self._begin(write, buffer, filename, offset))
        if validate:
            _compare(buffer, filename, offset)

    def _any(
        self,
        write: bool,
        buffer: Tensor,
        filename: FileName,
        validate: bool,
        async_op: bool,
        offset: int,
    ) -> int:
        if not async_op:
            self._now(write, buffer, filename, validate, offset)
            return 1
        ticket = self._begin(write, buffer, filename, offset)
        if validate:
            self._unchecked[ticket] = (buffer, filename, offset)
        return 0


def aio_read(
    buffer: Tensor,
    filename: FileName,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Fill the buffer from the start of a file, by a handle made for this one call; returns 0.

    Raises:
        OSError: as `aio_handle.read`.
    """
    handle = aio_handle(block_size, queue_depth, single_submit, overlap_events)
    return handle.read(buffer, filename, validate)


def aio_write(
    buffer: Tensor,
    filename: FileName,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Write the buffer to the start of a file, by a handle made for this one call; returns 0.

    Raises:
        OSError: as `aio_handle.write`.
    """
    handle = aio_handle(block_size, queue_depth, single_submit, overlap_events)
    return handle.write(buffer, filename, validate)


def deepspeed_memcpy(dest: Tensor, src: Tensor) -> int:
    """Copy the bytes of one CPU tensor over those of another, whatever their dtypes; returns 0.

    Raises:
        ValueError: they differ in bytes, or one is not contiguous.
    """
    to, source = as_bytes(dest), as_bytes(src)
    if to.numel() != source.numel():
        raise ValueError(explain("bytes cannot be copied", got=source.numel(), expected=to.numel()))
    to.copy_(source)
    return 0


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's bytes as a 1-D uint8 tensor that shares its memory."""
    flat = check_tensor(tensor).detach().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def _compare(buffer: Tensor, filename: FileName, offset: int) -> None:
    """Compare memory and file, the latter read by plain means."""
    name = os.dup(filename) if isinstance(filename, int) else Path(filename)
    with open(name, "rb") as file:
        file.seek(offset)
        at = offset
        for piece in as_bytes(buffer).cpu().split(_COMPARED_AT_ONCE):
            data = file.read(piece.numel())
            if data != piece.numpy().tobytes():
                raise OSError(
                    explain(
                        f"validation of {filename}: memory and file differ",
                        got=f"other bytes between {at} and {at + piece.numel()}",
                    )
                )
            at += piece.numel()
