# SPDX-License-Identifier: Apache-2.0
"""Curves without a plotting library: block characters for the terminal, and a PNG written with zlib alone."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# 5×7 letters, a row of five bits each; only what the axes say
_GLYPHS = {
    "0": "0E11131519110E", "1": "040C040404040E", "2": "0E11010204081F", "3": "1F02040201110E",
    "4": "02060A121F0202", "5": "1F101E0101110E", "6": "0608101E11110E", "7": "1F010204080808",
    "8": "0E11110E11110E", "9": "0E11110F01020C", ".": "00000000000C0C", "a": "00000E010F110F",
    "c": "00000E1010110E", "e": "00000E111F100E", "g": "000F11110F010E", "i": "04000C0404040E",
    "l": "0C04040404040E", "n": "0000161911 1111", "o": "00000E1111110E", "p": "00001E111E1010",
    "r": "00001619101010", "s": "00000E100E011E", "t": "08081C0808 0906", "u": "0000111111130D",
    "v": "00001111110A04", "y": "000011110F010E", " ": "00000000000000", "h": "10101619111111",
    "m": "00001A15151111", "d": "01010D13111 10F", "f": "0609081C080808", "-": "0000001F000000",
    "%": "18190204081303", "w": "0000111115150A", "b": "1010161911111E", "k": "10101214181412",
}  # fmt: skip
_INK, _GRID, _LINE, _FAINT = (60, 60, 67), (228, 228, 232), (31, 119, 180), (174, 205, 232)


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean of `values`, corrected for its start, so that a noisy curve can be read."""
    mean, out = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**count))
    return out


def text_curve(values: Sequence[float], width: int = 64, height: int = 10) -> str:
    """The curve as `height` lines of block characters with its largest and smallest value beside it."""
    cells = np.array_split(np.asarray(values, dtype=np.float64), min(width, len(values)))
    means = np.array([cell.mean() for cell in cells])
    low, high = float(means.min()), float(means.max())
    eighths = np.round((means - low) / max(high - low, 1e-12) * (height * 8 - 1)).astype(int) + 1
    lines = []
    for row in range(height - 1, -1, -1):
        label = f"{high:8.3f}" if row == height - 1 else f"{low:8.3f}" if row == 0 else " " * 8
        bars = "".join(" ▁▂▃▄▅▆▇█"[min(8, max(0, int(e) - row * 8))] for e in eighths)
        lines.append(f"{label} ┤{bars}")
    lines.append(f"{'':8} └{'─' * len(means)}")
    lines.append(f"{'':10}step 1{len(values):>{max(1, len(means) - 6)}}")
    return "\n".join(lines)


class _Canvas:
    """RGB pixels drawn three times too large and averaged down, which smooths every edge."""

    SCALE = 3

    def __init__(self, width: int, height: int) -> None:
        self.pixels = np.full((height * self.SCALE, width * self.SCALE, 3), 255, dtype=np.uint8)

    def box(self, x: float, y: float, w: float, h: float, colour: tuple[int, int, int]) -> None:
        s = self.SCALE
        top, left = max(0, round(y * s)), max(0, round(x * s))
        self.pixels[top : round((y + h) * s), left : round((x + w) * s)] = colour

    def line(self, xs: np.ndarray, ys: np.ndarray, colour: tuple[int, int, int], w: float) -> None:
        for x0, y0, x1, y1 in zip(xs, ys, xs[1:], ys[1:], strict=False):
            count = int(max(abs(x1 - x0), abs(y1 - y0)) * self.SCALE) + 2
            for x, y in zip(np.linspace(x0, x1, count), np.linspace(y0, y1, count), strict=True):
                self.box(x - w / 2, y - w / 2, w, w, colour)

    def text(self, x: float, y: float, words: str, size: float = 2) -> None:
        for letter in words:
            rows = bytes.fromhex(_GLYPHS[letter].replace(" ", ""))
            for r, bits in enumerate(rows):
                for c in range(5):
                    if bits >> (4 - c) & 1:
                        self.box(x + c * size, y + r * size, size, size, _INK)
            x += 6 * size

    def png(self) -> bytes:
        s = self.SCALE
        high, wide = self.pixels.shape[0] // s, self.pixels.shape[1] // s
        small = self.pixels.reshape(high, s, wide, s, 3).mean(axis=(1, 3)).astype(np.uint8)
        rows = b"".join(b"\0" + row.tobytes() for row in small)
        header = struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        )


def _tick(low: float, high: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts [low, high] into four to ten parts."""
    rough = max(high - low, 1e-9) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= rough))


def png_curve(
    path: Path, values: Sequence[float], title: str, width: int = 800, height: int = 480
) -> None:
    """Write the curve (faint) and its running mean (strong) over the step number to `path` as a PNG."""
    canvas, mean = _Canvas(width, height), smooth(values)
    left, top, right, bottom = 80, 50, width - 30, height - 60
    low, high, last = min(0.0, *values), max(values) * 1.05, len(values)
    x_of = np.linspace(left, right, max(last, 2))
    scale = (bottom - top) / (high - low)
    step = _tick(low, high)
    for mark in np.arange(np.ceil(low / step) * step, high, step):
        y = bottom - (mark - low) * scale
        canvas.box(left, y, right - left, 1, _GRID)
        label = f"{mark:.1f}" if step < 10 else f"{mark:.0f}"
        canvas.text(left - 12 * len(label) - 8, y - 7, label)
    across = _tick(0, last)
    for mark in np.arange(across, last + 1, across):
        x = left + (right - left) * (mark - 1) / max(last - 1, 1)
        canvas.box(x, bottom, 1, 6, _INK)
        canvas.text(x - 6 * len(f"{mark:.0f}"), bottom + 12, f"{mark:.0f}")
    canvas.box(left, top, 1, bottom - top, _INK)
    canvas.box(left, bottom, right - left, 1, _INK)
    for curve, colour, thick in ((values, _FAINT, 1.0), (mean, _LINE, 2.5)):
        canvas.line(x_of[:last], bottom - (np.asarray(curve) - low) * scale, colour, thick)
    canvas.text(left, 18, title)
    canvas.text((left + right) // 2 - 24, height - 26, "step")
    path.write_bytes(canvas.png())
