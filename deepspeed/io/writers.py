# SPDX-License-Identifier: Apache-2.0
"""Writers that ``torch.save`` takes for a file: through the file I/O queue, through Python, and to nowhere."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.ops.aio.async_io_op import aio_handle, as_bytes
from deepspeed.utils.errors import explain

_COUNT_BYTES = 8


@dataclass
class FastFileWriterConfig:
    """How a `FastFileWriter` works.

    Attributes:
        dnvme_handle: an `aio_handle`, which nobody else uses meanwhile.
        pinned_tensor: the buffer, 1-D and contiguous, of any dtype.
        double_buffer: fill one half while the other is being written.
        num_parallel_writers: kept for callers; each writer writes a file of its own.
        writer_rank: likewise.
        global_rank: likewise.
    """

    dnvme_handle: aio_handle
    pinned_tensor: Tensor
    double_buffer: bool = True
    num_parallel_writers: int = 1
    writer_rank: int = 0
    global_rank: int = 0


class _Writer:
    """What the writers share."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._calls = 0
        self._seconds = 0.0

    def write(self, buffer: Any) -> int:
        """Append bytes; returns how many."""
        start = time.perf_counter()
        count = self._append(buffer)
        self._seconds += time.perf_counter() - start
        self._calls += 1
        self.nbytes += count
        return count

    def _append(self, buffer: Any) -> int:
        raise NotImplementedError

    def _dump_state(self) -> None:
        """Print what was written and how long the writes took; benchmarks call it by this name."""
        rate = self.nbytes / self._seconds / 1e9 if self._seconds else 0.0
        print(
            f"{type(self).__name__}: {self.nbytes} bytes by {self._calls} writes in"
            f" {self._seconds:.3f} s, {rate:.2f} GB/s"
        )

    def save_torch_storage_object_list(
        self, storage_object_list: Sequence[Any], save_size: bool
    ) -> int:
        """Append storages, each after its number of elements if `save_size`; returns the bytes."""
        total = 0
        for storage in storage_object_list:
            if save_size:
                count = storage.nbytes() // storage.element_size()
                total += self.write(count.to_bytes(_COUNT_BYTES, "little"))
            untyped = getattr(storage, "_untyped_storage", storage).cpu()
            total += self.write(
                torch.tensor([], dtype=torch.uint8, device="cpu").set_(untyped).numpy().data
            )
        return total

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the file."""


class FastFileWriter(_Writer):
    """Gathers what is written in a page-locked buffer, which the I/O queue writes beside the caller.

    Args:
        file_path: made anew.
        config: the handle and its buffer.

    Raises:
        ValueError: a buffer of less than two bytes.
        OSError: the file cannot be made; later failures are raised by `write`, `flush` or `close`.
    """

    def __init__(self, file_path: str | os.PathLike[str], config: FastFileWriterConfig) -> None:
        super().__init__()
        memory = as_bytes(config.pinned_tensor)
        if memory.numel() < 2:
            raise ValueError(explain("the writer's buffer is too small", got=memory.numel()))
        self._handle = config.dnvme_handle
        self._halves = list(memory.chunk(2)) if config.double_buffer else [memory]
        self._path = Path(file_path)
        self._file = open(self._path, "w+b", buffering=0)  # noqa: SIM115
        self._half = 0
        self._filled = 0
        self._position = 0  # in the file, of the first byte in the buffer
        self._lent = False  # somebody has the descriptor and may have written by it

    def _append(self, buffer: Any) -> int:
        self._take_back()
        data = memoryview(buffer).cast("B")
        at = 0
        while at < len(data):
            room = self._halves[self._half]
            piece = data[at : at + room.numel() - self._filled]
            room.numpy()[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            at += len(piece)
            if self._filled == room.numel():
                self._send()
        return len(data)

    def flush(self) -> None:
        """Return when all bytes so far are with the system.

        Raises:
            OSError: they could not be written.
        """
        self._take_back()
        self._send()
        self._handle.wait()

    def fileno(self) -> int:
        """Return the descriptor, positioned at the end of what was written; bytes written by it count too."""
        self.flush()
        self._file.seek(self._position)
        self._lent = True
        return self._file.fileno()

    def close(self) -> None:
        """Write what is left and close the file; closing twice is fine.

        Raises:
            OSError: something could not be written.
        """
        if self._file.closed:
            return
        try:
            self.flush()
        finally:
            self._file.close()

    def _send(self) -> None:
        # The half to be filled next may still be on its way.
        self._handle.wait()
        if self._filled:
            piece = self._halves[self._half][: self._filled]
            self._handle.async_pwrite(piece, str(self._path), self._position)
            self._position += self._filled
            self._filled = 0
            self._half = (self._half + 1) % len(self._halves)
            if len(self._halves) == 1:
                self._handle.wait()

    def _take_back(self) -> None:
        if self._lent:
            end = self._file.tell()
            self.nbytes += end - self._position
            self._position = end
            self._lent = False


class PyFileWriter(_Writer):
    """Writes through Python's own file object.

    Args:
        file_path: made anew.
    """

    def __init__(self, file_path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._file = open(file_path, "wb")  # noqa: SIM115

    def _append(self, buffer: Any) -> int:
        return self._file.write(buffer)

    def flush(self) -> None:
        """Hand all bytes to the system."""
        self._file.flush()

    def fileno(self) -> int:
        """Return the descriptor."""
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MockFileWriter(_Writer):
    """Counts bytes and writes none, into a file that stays empty: what ``torch.save`` costs by itself."""

    def __init__(self, file_path: str | os.PathLike[str]) -> None:
        super().__init__()
        Path(file_path).write_bytes(b"")

    def _append(self, buffer: Any) -> int:
        return memoryview(buffer).nbytes

    def flush(self) -> None:
        """Do nothing."""
