# SPDX-License-Identifier: Apache-2.0
"""A copy of a state to write from while training changes the original: one block of memory, used again by each save."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import torch

from ..ops.aio.buffers import aligned_tensor
from .archive import Archive, byte_view

_UNIT = 4096
"""Copies begin on pages, as transfers past the page cache want it."""
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
        at, from_device = 0, False
        for archive in archives:
            for record in archive.storages:
                if isinstance(record.source, bytes) or self._memory is None:
                    continue
                source = byte_view(record.source)
                copy = self._memory[at : at + record.size]
                copy.copy_(source, non_blocking=True)
                from_device |= source.is_cuda
                record.source = copy
                at += _rounded(record.size)
        if from_device:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give the memory back."""
        self._memory = None


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
