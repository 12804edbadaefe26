# SPDX-License-Identifier: Apache-2.0
"""Copies between a GPU and the host's memory that neither of them stands still for.

[Note: Page-locked pieces]
A GPU reads and writes page-locked memory by itself. Any other memory is copied by the driver, and the program waits.
States may not be page-locked (`pin_memory` off, or the system's limit), nor are they always in the dtype of what travels,
or to be overwritten by it. Where they are not, values travel in pieces of page-locked memory, which torch lends again once
the GPU is done with them, and the host converts or adds them up on its side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from deepspeed.comm import flat

from .slab import store
from .tiers import page_locked

_PIECE = 4 << 20
"""Elements that travel at once."""
_MOST_BYTES = 128 << 20
"""That wait on the host's side at once, at most, before the program waits for them."""

_streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}


def pieces_for(target: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Fill a tensor of a GPU from the host: while one piece is made, the one before it travels.

    Args:
        target: flat, on a GPU. What its current stream does later sees the new values.

    Yields:
        Where the piece begins, and host memory of its size in the target's dtype, to be filled before the next is asked
        for.
    """
    stream = torch.cuda.current_stream(target.device)
    sent: deque[torch.cuda.Event] = deque()
    for start in range(0, target.numel(), _PIECE):
        place = target.narrow(0, start, min(_PIECE, target.numel() - start))
        if len(sent) == 2:
            sent.popleft().synchronize()
        piece = page_locked(place.numel(), place.dtype)
        yield start, piece
        place.copy_(piece, non_blocking=True)
        sent.append(stream.record_event())


@dataclass(frozen=True)
class _Sent:
    """A copy to a GPU. `wait` has what its current stream does from now on come after it; the host goes on."""

    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


def bring(values: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, flat.Handle]:
    """Bring values to where they are computed with; from the host to a GPU beside its work.

    Args:
        values: flat. On the host and page-locked, they must not change before the copy is over.
        device: where to.

    Returns:
        The values there, themselves if that is where they are, and what to wait for before they are used.
    """
    if not (values.is_cpu and device.type == "cuda"):
        return values.to(device), flat.DONE
    stream = _stream_of(device, "to")
    there = torch.empty_like(values, device=device)
    # which may still use what had the memory before
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        if values.is_pinned():
            there.copy_(values, non_blocking=True)
        else:
            for start, piece in pieces_for(there):
                piece.copy_(values.narrow(0, start, piece.numel()))
    there.record_stream(stream)
    return there, _Sent(stream.record_event(), device)


@dataclass
class _Arrival:
    """A piece on its way to the host.

    Attributes:
        event: it is there.
        piece: page-locked memory that it comes to; None where that is its place.
        place: where it belongs.
        fresh: whether it takes the place of what is there, or is added to it.
        then: called when it is in its place.
    """

    event: torch.cuda.Event
    piece: torch.Tensor | None
    place: torch.Tensor
    fresh: bool
    then: Callable[[], None] | None = None


class Incoming:
    """Values that come from a GPU, put in their places in host memory in the order in which they were sent.

    The GPU sends them beside its own work. `settle` has to be called before the places are read, or written by others.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Arrival] = deque()
        self._bytes = 0

    def send(
        self,
        values: torch.Tensor,
        place: torch.Tensor,
        fresh: bool,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Send values on their way.

        Args:
            values: flat, on a GPU. Their memory may be freed after this; before it is written again, `fence`.
            place: host memory of their size, in any dtype of numbers.
            fresh: overwrite what is there, else add.
            then: called when all of them are in their place; by a later call of this object.
        """
        stream = _stream_of(values.device, "from")
        stream.wait_stream(torch.cuda.current_stream(values.device))
        straight = fresh and values.dtype == place.dtype and place.is_pinned()
        size = max(1, values.numel()) if straight else _PIECE
        with torch.cuda.stream(stream):
            for start in range(0, values.numel(), size):
                source = values.narrow(0, start, min(size, values.numel() - start))
                target = place.narrow(0, start, source.numel())
                piece = None if straight else page_locked(source.numel(), source.dtype)
                (target if piece is None else piece).copy_(source, non_blocking=True)
                self._waiting.append(_Arrival(stream.record_event(), piece, target, fresh))
                self._bytes += 0 if piece is None else piece.nbytes
                self._take_in(_MOST_BYTES)
        values.record_stream(stream)
        if self._waiting:
            self._waiting[-1].then = then
        elif then is not None:
            then()

    def settle(self) -> None:
        """Wait until everything is in its place."""
        self._take_in(-1)

    @staticmethod
    def fence(device: torch.device) -> None:
        """What the current stream of a GPU does from now on comes after everything that was sent from it."""
        if (device, "from") in _streams:
            torch.cuda.current_stream(device).wait_stream(_streams[device, "from"])

    def _take_in(self, most: int) -> None:
        """Put in place what has arrived, and wait for the oldest as long as more than `most` bytes are on their way."""
        while self._waiting and (self._bytes > most or self._waiting[0].event.query()):
            arrival = self._waiting.popleft()
            arrival.event.synchronize()
            if arrival.piece is not None:
                self._bytes -= arrival.piece.nbytes
                store(arrival.place, arrival.piece, arrival.fresh)
            if arrival.then is not None:
                arrival.then()


def _stream_of(device: torch.device, way: str) -> torch.cuda.Stream:
    if (device, way) not in _streams:
        _streams[device, way] = torch.cuda.Stream(device)
    return _streams[device, way]
