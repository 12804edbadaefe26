# SPDX-License-Identifier: Apache-2.0
"""A line that shows how far a large save is: only on a terminal, and only when it takes more than a second."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_PATIENCE = 1.0
_INTERVAL = 0.2
_WIDTH = 30


class Progress:
    """Counts bytes, and draws a bar where somebody may be looking.

    Args:
        total: bytes to expect; 0 draws nothing.
        label: what is on its way.
        stream: where to draw; nothing is drawn if it is no terminal.
    """

    def __init__(self, total: int = 0, label: str = "", stream: TextIO | None = None) -> None:
        self.total, self.label, self.done = total, label, 0
        self._stream = sys.stderr if stream is None else stream
        self._visible = total > 0 and bool(getattr(self._stream, "isatty", bool)())
        self._begun = time.monotonic()
        self._next = self._begun + _PATIENCE
        self._drawn = False

    def add(self, nbytes: int) -> None:
        """So many bytes more are there."""
        self.done += nbytes
        now = time.monotonic()
        if self._visible and now >= self._next:
            self._next = now + _INTERVAL
            self._draw(now)

    def close(self) -> None:
        """End the line, if one was drawn."""
        if self._drawn:
            self._draw(time.monotonic())
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False

    def _draw(self, now: float) -> None:
        share = min(1.0, self.done / self.total)
        bar = "#" * int(share * _WIDTH)
        speed = self.done / max(now - self._begun, 1e-9) / 1e9
        self._stream.write(
            f"\r{self.label} [{bar:<{_WIDTH}}] {share:4.0%} {self.done / 1e9:.1f}/{self.total / 1e9:.1f} GB "
            f"{speed:.2f} GB/s"
        )
        self._stream.flush()
        self._drawn = True
