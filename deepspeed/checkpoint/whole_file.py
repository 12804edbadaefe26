# SPDX-License-Identifier: Apache-2.0
"""A file brought into memory at once: many transfers at a time into large pages, summed as they arrive.

Mapping a file costs least where little of it is needed. Where all of it has to be summed before it is trusted, small
pages of the page cache and of what it is copied to cost more time than the transfer: here each byte is moved once, into
large pages of our own, past the page cache if it is not there. A large record has memory of its own, so that who wants
the tensor in it can keep that (`Slot.is_lent`) rather than a copy.
"""

from __future__ import annotations

import os
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import psutil
import torch

from ..ops import pages
from ..ops.aio.buffers import aligned_tensor
from ..ops.aio.library import Options
from ..ops.aio.queue import FileQueue
from ..utils import env
from .archive import byte_view
from .digest import combine_all, crc32_of_address, threads

_LEAST = 4 << 20
OWN_BLOCK = 4 << 20
"""Records of at least so many bytes have memory of their own."""
_CHUNK, _CACHED_CHUNK = 16 << 20, 4 << 20
_IN_FLIGHT = 8
_PROBES = 16
_PAGE = 4096
_SHARE = 1 / 4
"""At most this part of the memory that nobody uses is taken for files, by all ranks of a machine together. The page
cache does not count: large pages would have to be won back from it, which takes longer than reading. So would those
that memory in small runs would have to be moved together for, of which `_RUNS` may be taken."""
_RUNS = 3 / 4


class WholeFile:
    """A file's bytes, and their CRC-32.

    Args:
        blocks: the bytes in a row.
        crc32: their sum.
    """

    def __init__(self, blocks: Sequence[torch.UntypedStorage], crc32: int) -> None:
        self.blocks, self.crc32 = list(blocks), crc32
        self._begins = list(accumulate((block.nbytes() for block in self.blocks), initial=0))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._begins[-1]

    def record(self, begin: int, nbytes: int) -> torch.UntypedStorage:
        """A part as a storage that cannot grow; it shares the memory and keeps it alive, or is a copy if it lies in several
        blocks."""
        index = min(bisect_right(self._begins, begin), len(self.blocks)) - 1
        within = begin - self._begins[index]
        if within + nbytes <= self.blocks[index].nbytes():
            return self.blocks[index][within : within + nbytes]
        parts = [torch.empty(0, dtype=torch.uint8)]
        end = begin + nbytes
        for start, block in zip(self._begins, self.blocks, strict=False):
            lo, hi = max(begin, start), min(end, start + block.nbytes())
            if lo < hi:
                parts.append(byte_view(block)[lo - start : hi - start])
        return torch.cat(parts).untyped_storage()[:nbytes]

    def text(self, begin: int, nbytes: int) -> bytes:
        """The bytes of a part."""
        return bytes(byte_view(self.record(begin, nbytes)).numpy())

    def records(self, path: Path) -> dict[str, tuple[int, int]]:
        """Offsets and lengths of the zip archive's records, by their names below its folder.

        Raises:
            ValueError: a record's header is not where the directory says.
        """
        found = {}
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if item.header_offset + 30 > self.size:
                    raise ValueError(f"no record at {item.header_offset}")
                header = self.text(item.header_offset, 30)
                if header[:4] != b"PK\x03\x04":
                    raise ValueError(f"no record at {item.header_offset}")
                begin = item.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
                if begin + item.file_size > self.size:
                    raise ValueError(f"record {item.filename!r} reaches beyond the end of the file")
                found[item.filename.partition("/")[2]] = (begin, item.file_size)
        return found


def pays(*paths: Path) -> bool:
    """Whether to read files by `read_whole`: large ones that leave memory to others."""
    size = sum(path.stat().st_size for path in paths)
    ranks = env.LOCAL_WORLD_SIZE.get() or env.LOCAL_SIZE.get() or 1
    at_most = _SHARE * psutil.virtual_memory().free
    runs = pages.free_large()
    if runs is not None:
        at_most = min(at_most, _RUNS * runs)
    return _LEAST <= size <= at_most / max(ranks, 1)


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
    begins = _block_begins(path, size)
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], size], strict=True)]
    blocks = [aligned_tensor(length, torch.uint8) for length in lengths]
    cached = _is_cached(path, size)
    chunk = _CACHED_CHUNK if cached else _CHUNK
    pieces = [
        (begin + at, block[at : at + chunk])
        for begin, block in zip(begins, blocks, strict=True)
        for at in range(0, block.numel(), chunk)
    ]
    sums = _copied(path, pieces) if cached else _transferred(path, pieces)
    total = combine_all(zip(sums, (piece.numel() for _, piece in pieces), strict=True))
    return WholeFile([block.untyped_storage() for block in blocks], total)


def _block_begins(path: Path, size: int) -> list[int]:
    """Where the file is cut, on pages: what begins a large record's data lies in one block with its end."""
    begins = {0}
    try:
        with zipfile.ZipFile(path) as archive:
            items = sorted((item.header_offset, item.file_size) for item in archive.infolist())
            ends = [*(offset for offset, _ in items[1:]), archive.start_dir]
    except Exception:  # it is judged where its content is read
        return [0]
    for (offset, nbytes), end in zip(items, ends, strict=False):
        if nbytes >= OWN_BLOCK:
            begins |= {-(-offset // _PAGE) * _PAGE, -(-end // _PAGE) * _PAGE}
    return sorted(begin for begin in begins if 0 <= begin < size)


def _copied(path: Path, pieces: Sequence[tuple[int, torch.Tensor]]) -> list[int]:
    """Fill the pieces through the page cache, each summed by the thread that has just read it."""

    def one(item: tuple[int, torch.Tensor]) -> int:
        offset, piece = item
        view: memoryview = piece.numpy().data
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while view.nbytes:
                got = file.readinto(view)
                if not got:
                    raise OSError(f"{path} ends before byte {offset + piece.numel()}")
                view = view[got:]
        return _sum(piece)

    with ThreadPoolExecutor(threads(), "checkpoint-read") as pool:
        return list(pool.map(one, pieces))


def _transferred(path: Path, pieces: Sequence[tuple[int, torch.Tensor]]) -> list[int]:
    """Fill the pieces past the page cache, summed by other threads as they arrive."""
    options = Options(intra_op_parallelism=2)
    with FileQueue(options) as queue, ThreadPoolExecutor(threads(), "checksum") as summers:
        tickets: list[int] = []
        sums: list[Future[int]] = []
        for place, (_, piece) in enumerate(pieces):
            for offset, ahead in pieces[len(tickets) : place + _IN_FLIGHT]:
                tickets.append(queue.submit_read(path, offset, ahead))
            queue.wait(tickets[place])
            sums.append(summers.submit(_sum, piece))
        return [summed.result() for summed in sums]


def _sum(piece: torch.Tensor) -> int:
    return crc32_of_address(piece.data_ptr(), piece.numel())
