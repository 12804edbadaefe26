# SPDX-License-Identifier: Apache-2.0
"""Writing an `Archive`: many transfers at a time past the page cache, summed meanwhile; or one after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..utils.logging import logger
from . import atomic
from .archive import Archive, Record, byte_view, record_bytes
from .atomic import Entry, HashedFile
from .digest import combine_all, crc32, crc32_of_address, text_of, threads
from .pace import Pace
from .progress import Progress

FAST, PYTHON, MOCK = "FAST", "PYTHON", "MOCK"
BY_QUEUE = 4 << 20
"""Smaller files are not worth a queue."""
_CHUNK = 16 << 20
_IN_FLIGHT = 8


@dataclass(frozen=True)
class Settings:
    """How files are written: the section ``checkpoint.writer``.

    Attributes:
        type: FAST (many transfers at a time), PYTHON (one after the other), MOCK (none, to measure the rest).
        data_parallel: which ranks write together a file that several could write alone; see `joint.divide`.
        io_buffer_size: bytes of the buffer through which states of a device pass.
        io_buffer_double: fill one half of it while the other is written.
        show_statistics: print the speed of each file.
        io_multiplier: write everything so many times (to measure).
    """

    type: str = FAST
    data_parallel: str | None = None
    io_buffer_size: int = 64 << 20
    io_buffer_double: bool = True
    show_statistics: bool = False
    io_multiplier: int = 1
    summers: int = 0
    """Threads that take checksums; 0 is as many as there are use for."""


def write_archive(
    path: Path,
    archive: Archive,
    settings: Settings | None = None,
    progress: Progress | None = None,
    *,
    pace: Pace | None = None,
    flush: bool = True,
) -> Entry:
    """Write one file and flush it to the disk.

    Args:
        path: made anew, unless several processes write it (`joint`): then it is there.
        archive: what to write; its storages must stay as they are meanwhile.
        settings: how; the fast way if None.
        progress: is told of every byte.
        pace: when each piece may go; at once if None.
        flush: False leaves that to the caller (`atomic.flush_files`).

    Returns:
        The manifest's entry; of a file that another process leads one without a checksum.

    Raises:
        OSError: the disk is full, or fails. All transfers are over then.
    """
    settings = settings or Settings()
    progress = progress or Progress()
    start = time.perf_counter()
    for _ in range(settings.io_multiplier):
        if settings.type == MOCK:
            entry = _mock(path, archive)
        elif not archive.is_divided and (settings.type == PYTHON or archive.size < BY_QUEUE):
            entry = _in_a_row(path, archive, progress, pace, flush)
        else:
            entry = _Parallel(path, archive, settings, progress, pace).write(flush)
    if settings.show_statistics:
        seconds = time.perf_counter() - start
        moved = archive.size * settings.io_multiplier
        logger.warning(
            f"checkpoint writer {settings.type}: {path.name}, {moved / 1e9:.3f} GB in {seconds:.3f} s, "
            f"{moved / max(seconds, 1e-9) / 1e9:.2f} GB/s"
        )
    return entry


def _mock(path: Path, archive: Archive) -> Entry:
    return Entry(path.name, archive.size, text_of(0))


def _in_a_row(
    path: Path, archive: Archive, progress: Progress, pace: Pace | None, flush: bool
) -> Entry:
    for record in archive.records:
        record.crc = crc32(record_bytes(record)) if record.is_large else None
    pieces: list[Any] = [record for record in archive.records if record.is_large]
    with HashedFile(path, flush) as file:
        for start, gap in archive.gaps():
            progress.add(file.write(gap))
            if pieces and pieces[0].begin == start + len(gap):  # a long gap comes in parts
                progress.add(written := file.write(record_bytes(pieces.pop(0))))
                if pace is not None:
                    pace.rest(written)
    return file.entry()


class _Flight(NamedTuple):
    record: Record
    ticket: int
    sum: Future[int] | None
    length: int
    lent: torch.Tensor | None
    """The buffer that is free again afterwards."""


class _Parallel:
    """One file on its way through a queue."""

    def __init__(
        self,
        path: Path,
        archive: Archive,
        settings: Settings,
        progress: Progress,
        pace: Pace | None = None,
    ) -> None:
        self.path, self.archive, self.progress, self.pace = path, archive, progress, pace
        self.summers = settings.summers
        self.halves = 2 if settings.io_buffer_double else 1
        self.buffer_bytes = max(1 << 20, settings.io_buffer_size // self.halves)
        self.free: list[torch.Tensor] | None = None
        self.flights: deque[_Flight] = deque()
        self.sums: dict[int, list[tuple[int, int]]] = {}

    def write(self, flush: bool) -> Entry:
        """Write it all; see `write_archive`."""
        how = atomic.disk.reopen if self.archive.is_divided else atomic.disk.create
        with how(self.path) as file, ExitStack() as stack:
            workers = self.summers or threads()
            summers = stack.enter_context(ThreadPoolExecutor(workers, "checkpoint-sum"))
            self.queue = stack.enter_context(atomic.disk.open_queue())
            stack.callback(summers.shutdown, cancel_futures=True)
            for piece in self.archive.pieces:
                self._send_record(piece, summers)
            while self.flights:
                self._retire()
            for piece in self.archive.pieces:
                if piece.crc is None:
                    piece.crc = combine_all(self.sums[id(piece)])
            gaps = self._send_gaps()
            if flush:
                atomic.disk.sync(file)
        whole = text_of(self.archive.crc(gaps)) if self.archive.leads else ""
        return Entry(self.path.name, self.archive.size, whole)

    def _send_gaps(self) -> list[tuple[int, int, int]]:
        """Write what lies between the pieces, many at a time; returns offsets, sums and lengths."""
        if not self.archive.leads:
            return []
        found = []
        tickets: deque[int] = deque()
        for start, gap in self.archive.gaps():
            found.append((start, crc32(gap), len(gap)))
            if len(tickets) >= _IN_FLIGHT:
                atomic.disk.settle(self.queue, tickets.popleft())
            if gap:
                data = torch.frombuffer(gap, dtype=torch.uint8)
                tickets.append(atomic.disk.send(self.queue, self.path, start, data))
                self.progress.add(len(gap))
        while tickets:
            atomic.disk.settle(self.queue, tickets.popleft())
        return found

    def _send_record(self, record: Record, summers: ThreadPoolExecutor) -> None:
        self.sums[id(record)] = []
        at = record.begin
        for piece, lent in self._pieces(record):
            paced = self.pace is not None and not self.pace.is_lifted
            while len(self.flights) >= (1 if paced else _IN_FLIGHT):
                self._retire()
            length = piece.numel()
            summed = summers.submit(_sum, piece) if record.crc is None else None
            ticket = atomic.disk.send(self.queue, self.path, at, piece)
            self.flights.append(_Flight(record, ticket, summed, length, lent))
            at += length

    def _pieces(self, record: Record) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        source = record.source
        if isinstance(source, bytes):
            yield torch.frombuffer(bytearray(source), dtype=torch.uint8), None
            return
        view = byte_view(source)
        if view.device.type == "cpu":
            yield from ((piece, None) for piece in view.split(_CHUNK))
            return
        for piece in view.split(self.buffer_bytes):
            buffer = self._take_buffer()
            host = buffer[: piece.numel()]
            host.copy_(piece)
            yield host, buffer

    def _take_buffer(self) -> torch.Tensor:
        if self.free is None:
            pinned = torch.cuda.is_available()
            self.free = [
                torch.empty(self.buffer_bytes, dtype=torch.uint8, pin_memory=pinned, device="cpu")
                for _ in range(self.halves)
            ]
        while not self.free:
            self._retire()
        return self.free.pop()

    def _retire(self) -> None:
        flight = self.flights.popleft()
        atomic.disk.settle(self.queue, flight.ticket)
        if flight.sum is not None:
            self.sums[id(flight.record)].append((flight.sum.result(), flight.length))
        self.progress.add(flight.length)
        if flight.lent is not None and self.free is not None:
            self.free.append(flight.lent)
        if self.pace is not None:
            self.pace.rest(flight.length)


def _sum(piece: torch.Tensor) -> int:
    return crc32_of_address(piece.data_ptr(), piece.numel())
