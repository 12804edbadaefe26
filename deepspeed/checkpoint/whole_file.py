# SPDX-License-Identifier: Apache-2.0
"""A file brought into memory at once: many transfers at a time past the page cache, summed as they arrive.

Mapping a file costs least where little of it is needed, or where it is in the page cache already. Where all of it has
to come from the disk and be summed before it is trusted, the page cache is a detour: a disk delivers up
to three times as fast into large pages of our own.
"""

from __future__ import annotations

import os
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from ..ops.aio.buffers import aligned_tensor
from ..ops.aio.queue import FileQueue
from ..utils import env
from .archive import byte_view
from .digest import combine_all, crc32_of_address, threads

_LEAST = 4 << 20
_CHUNK = 16 << 20
_IN_FLIGHT = 8
_PROBES = 16
_SHARE = 1 / 16
"""At most this part of the memory that nobody uses is taken for a file, by all ranks of a machine together. The page
cache does not count: large pages would have to be won back from it, which takes longer than reading."""


class WholeFile(NamedTuple):
    """A file's bytes, and their CRC-32."""

    memory: torch.UntypedStorage
    crc32: int

    def record(self, begin: int, nbytes: int) -> torch.UntypedStorage:
        """A part as a storage that shares the memory, keeps it alive, and cannot grow."""
        return self.memory[begin : begin + nbytes]

    def records(self, path: Path) -> dict[str, tuple[int, int]]:
        """Offsets and lengths of the zip archive's records, by their names below its folder.

        Raises:
            ValueError: a record's header is not where the directory says.
        """
        found = {}
        bytes_of = byte_view(self.memory).numpy().data
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                header = bytes(bytes_of[item.header_offset : item.header_offset + 30])
                if header[:4] != b"PK\x03\x04":
                    raise ValueError(f"no record at {item.header_offset}")
                begin = item.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
                if begin + item.file_size > len(bytes_of):
                    raise ValueError(f"record {item.filename!r} reaches beyond the end of the file")
                found[item.filename.partition("/")[2]] = (begin, item.file_size)
        return found


def pays(path: Path) -> bool:
    """Whether to read a file by `read_whole`: a large one that is not in the page cache, and leaves memory to others."""
    size = path.stat().st_size
    if size < _LEAST:
        return False
    ranks = env.LOCAL_WORLD_SIZE.get() or env.LOCAL_SIZE.get() or 1
    if size * max(ranks, 1) > _SHARE * psutil.virtual_memory().free:
        return False
    return not _is_cached(path, size)


def _is_cached(path: Path, size: int) -> bool:
    """Whether the page cache holds a file, as far as a few probes tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    probe = bytearray(1)
    with open(path, "rb", buffering=0) as file:
        for place in range(_PROBES):
            try:
                os.preadv(file.fileno(), [probe], place * (size - 1) // _PROBES, os.RWF_NOWAIT)
            except OSError:  # it would have to wait for the disk, or cannot tell
                return False
    return True


def read_whole(path: Path) -> WholeFile:
    """Read a file.

    Raises:
        OSError: it cannot be read, or becomes shorter meanwhile.
    """
    size = path.stat().st_size
    memory = aligned_tensor(size, torch.uint8)
    sums: list[Any] = []
    with FileQueue() as queue, ThreadPoolExecutor(threads(), "checksum") as summers:
        begins = list(range(0, size, _CHUNK))
        tickets: dict[int, int] = {}
        for place, begin in enumerate(begins):
            for ahead in begins[place : place + _IN_FLIGHT]:
                if ahead not in tickets:
                    piece = memory[ahead : ahead + _CHUNK]
                    tickets[ahead] = queue.submit_read(path, ahead, piece)
            queue.wait(tickets[begin])
            piece = memory[begin : begin + _CHUNK]
            summed = summers.submit(crc32_of_address, piece.data_ptr(), piece.numel())
            sums.append((summed, piece.numel()))
        total = combine_all((summed.result(), length) for summed, length in sums)
    return WholeFile(memory.untyped_storage(), total)
