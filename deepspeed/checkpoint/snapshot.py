# SPDX-License-Identifier: Apache-2.0
"""A copy of a state to write from while training changes the original: one block of memory, used again by each save.

What lies on the host is summed as it is copied, out of the caches: a later sum beside training would read all of it
again, on a core that training wants. What comes from a device is summed beside: there the cores are idle.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import torch

from ..ops.aio.buffers import aligned_tensor
from .archive import Archive, Record, byte_view
from .digest import combine_all, copy_and_sum

_UNIT = 4096
"""Copies begin on pages, as transfers past the page cache want it."""
_PIECE = 8 << 20
"""What a thread takes at a time: enough that threads rarely meet."""
_SHARE = 0.5
"""At most this part of a machine's free memory is taken."""


class Snapshot:
    """Owns the memory; at most one copy lives in it."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are held."""
        return 0 if self._memory is None else self._memory.numel()

    def wants(self, archives: Iterable[Archive]) -> int:
        """Bytes of memory that a copy of these takes beyond what is held."""
        return max(0, _bytes_of(archives) - self.nbytes)

    def take(self, archives: Iterable[Archive]) -> None:
        """Copy every storage of the archives, which then no longer name the originals.

        Raises:
            MemoryError: there is not so much memory.
        """
        archives = list(archives)
        nbytes = _bytes_of(archives)
        if nbytes > self.nbytes:
            self._memory = None  # first let go of the old
            self._memory = aligned_tensor(nbytes, torch.uint8)
        if self._memory is None:
            return
        at, from_device = 0, False
        with ThreadPoolExecutor(torch.get_num_threads(), "checkpoint-copy") as pool:
            begun = []
            for archive in archives:
                for record in archive.storages:
                    source = byte_view(record.source)  # type: ignore[arg-type]
                    record.source = copy = self._memory[at : at + record.size]
                    at += _rounded(record.size)
                    if source.device.type == "cpu":
                        begun.append((record, _begin(pool, source, copy, record)))
                    else:
                        copy.copy_(source, non_blocking=True)
                        from_device |= source.is_cuda
            for record, pieces in begun:
                parts = [piece.result() for piece in pieces]
                if record.is_large and record.crc is None:
                    record.crc = combine_all(parts)
        if from_device:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give the memory back."""
        self._memory = None


def _begin(
    pool: ThreadPoolExecutor, source: torch.Tensor, copy: torch.Tensor, record: Record
) -> list[Future[tuple[int, int]]]:
    """Begin to copy in pieces, which give their sums and lengths; sums of 0 where they are not needed."""
    wanted = record.is_large and record.crc is None

    def piece(begin: int) -> tuple[int, int]:
        length = min(_PIECE, record.size - begin)
        address = source.data_ptr() + begin
        if wanted:
            return copy_and_sum(address, copy.data_ptr() + begin, length), length
        ctypes.memmove(copy.data_ptr() + begin, address, length)
        return 0, length

    return [pool.submit(piece, begin) for begin in range(0, record.size, _PIECE)]


def can_all_copy(exchange: Callable[[object], list[Any]], wanted: int) -> bool:
    """Collectively: whether the ranks of each machine find what they want in half of its free memory."""
    available = psutil.virtual_memory().available
    told = exchange((socket.gethostname(), wanted, available))
    for host in {name for name, _, _ in told}:
        here = [(want, free) for name, want, free in told if name == host]
        if sum(want for want, _ in here) > _SHARE * min(free for _, free in here):
            return False
    return True


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _UNIT) * _UNIT


def _bytes_of(archives: Iterable[Archive]) -> int:
    return sum(_rounded(record.size) for archive in archives for record in archive.storages)
