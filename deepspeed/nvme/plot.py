# SPDX-License-Identifier: Apache-2.0
"""A bar chart as a PNG file, by the standard library alone."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

_WHITE, _BLACK, _GREY = (255, 255, 255), (40, 40, 40), (215, 215, 215)
COLORS = ((70, 120, 190), (225, 140, 60), (90, 160, 90))
# Digits and the point, five rows of three dots each.
_FONT = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
    ".": (0, 0, 0, 0, 2),
}
_LEFT, _TOP, _BOTTOM = 60, 20, 30


class Canvas:
    """An RGB picture to draw rectangles and numbers on; (0, 0) is the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._rows = [bytearray(_WHITE * width) for _ in range(height)]

    def box(self, x: int, y: int, width: int, height: int, color: tuple[int, int, int]) -> None:
        """Fill a rectangle, cut to the picture."""
        x, right = max(x, 0), min(x + width, self.width)
        if right <= x:
            return
        line = bytes(color) * (right - x)
        for row in self._rows[max(y, 0) : max(y + height, 0)]:
            row[3 * x : 3 * right] = line

    def number(self, x: int, y: int, text: str, scale: int = 2) -> None:
        """Draw digits and points, beginning at the upper left corner (x, y)."""
        for place, character in enumerate(text):
            for line, bits in enumerate(_FONT[character]):
                for column in range(3):
                    if bits >> (2 - column) & 1:
                        at = x + (4 * place + column) * scale
                        self.box(at, y + line * scale, scale, scale, _BLACK)

    def png(self) -> bytes:
        """Return the picture as a PNG file."""

        def chunk(name: bytes, data: bytes) -> bytes:
            body = name + data
            return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        data = zlib.compress(b"".join(b"\0" + bytes(row) for row in self._rows))
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", data)
            + chunk(b"IEND", b"")
        )


def bar_chart(path: Path, groups: Sequence[Sequence[float]]) -> None:
    """Write a chart with one group of bars a row of values, numbered from 1; lines mark round values.

    Args:
        path: the PNG file.
        groups: values >= 0; the bars of a group have the colors of `COLORS` in order.
    """
    bar, gap, height = 12, 14, 300
    widest = max((len(group) for group in groups), default=1)
    step = bar * widest + gap
    canvas = Canvas(_LEFT + step * len(groups) + gap, _TOP + height + _BOTTOM)
    top = max((value for group in groups for value in group), default=0) or 1.0
    for mark in range(5):
        y = _TOP + height - height * mark // 4
        canvas.box(_LEFT, y, canvas.width, 1, _GREY if mark else _BLACK)
        canvas.number(4, y - 5, f"{top * mark / 4:.2f}")
    for place, group in enumerate(groups):
        x = _LEFT + gap + step * place
        for i, value in enumerate(group):
            tall = round(height * value / top)
            canvas.box(x + bar * i, _TOP + height - tall, bar - 1, tall, COLORS[i % len(COLORS)])
        canvas.number(x, _TOP + height + 8, str(place + 1))
    path.write_bytes(canvas.png())
