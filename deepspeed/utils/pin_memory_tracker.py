# SPDX-License-Identifier: Apache-2.0
"""How much host memory was page-locked so far, told each time the sum doubles: locked pages are gone for all others."""

from __future__ import annotations

import threading

from deepspeed.utils.logging import logger

_FIRST_CHECKPOINT = 32 << 30


class _Tracker:
    """Sums of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Start again from nothing; for tests, which share the one tracker of a process."""
        self._bytes = 0
        self._calls = 0
        self._next_checkpoint = _FIRST_CHECKPOINT

    def add(self, nbytes: int) -> int:
        """Add one allocation; returns the last checkpoint that it reached, in bytes, or 0."""
        with self._lock:
            self._bytes += nbytes
            self._calls += 1
            reached = 0
            while self._bytes >= self._next_checkpoint:
                reached = self._next_checkpoint
                self._next_checkpoint *= 2
            return reached


_tracker = _Tracker()


def track_pinned_memory(nbytes: int) -> None:
    """Count an allocation of page-locked memory; at 32 GB, and whenever that doubles, the log is told."""
    reached = _tracker.add(nbytes)
    if reached:
        total, calls = _fmt_bytes(_tracker._bytes), _tracker._calls
        logger.info(
            "page-locked memory passed the checkpoint of %s: %s in %d allocations",
            _fmt_bytes(reached),
            total,
            calls,
        )


def pinned_memory_summary(title: str = "") -> None:
    """Log the sums so far."""
    head = f"{title}: " if title else ""
    logger.info(
        "%spage-locked memory: %s in %d allocations",
        head,
        _fmt_bytes(_tracker._bytes),
        _tracker._calls,
    )


def _fmt_bytes(nbytes: int) -> str:
    for unit, size, places in (("GB", 1 << 30, 2), ("MB", 1 << 20, 2), ("KB", 1 << 10, 1)):
        if nbytes >= size:
            return f"{nbytes / size:.{places}f} {unit}"
    return f"{nbytes} B"
