# SPDX-License-Identifier: Apache-2.0
"""Numbers for people: a few digits and a prefix of the SI."""

from __future__ import annotations

_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    """Return `num` with a prefix, as ``"1.5 G"``.

    Args:
        num: any real number.
        units: prefix to use, one of T, G, M, K, m, u or ""; None takes the largest that leaves one digit.
        precision: digits after the point.

    Raises:
        ValueError: no such prefix.

    Example:
        >>> number_to_string(1_234_567)
        '1.23 M'
        >>> number_to_string(123_456, units="M", precision=4)
        '0.1235 M'
    """
    if units is None:
        size = abs(num)
        fits = (prefix for prefix, unit in _PREFIXES.items() if size >= unit)
        units = "" if size == 0 else next(fits, "u")
    if units not in _PREFIXES:
        raise ValueError(f"no such unit: got {units!r}, expected one of {list(_PREFIXES)}")
    return f"{_plain(num / _PREFIXES[units], precision)} {units}"


def _plain(value: float, precision: int) -> str:
    rounded = round(value, precision)
    if rounded == int(rounded):
        return str(int(rounded))
    return f"{rounded:.{max(precision, 0)}f}".rstrip("0")


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    """Multiply-accumulate operations, as ``"1.5 GMACs"``."""
    return f"{number_to_string(macs, units, precision)}MACs"


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    """Floating-point operations per second, as ``"1.5 GFLOPS"``."""
    return f"{number_to_string(flops, units, precision)}FLOPS"


def bytes_to_string(num_bytes: float, units: str | None = None, precision: int = 2) -> str:
    """Bytes in powers of ten, as ``"1.5 GB"``."""
    return f"{number_to_string(num_bytes, units, precision)}B"


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    """Seconds, as ``"12.3 ms"``."""
    return f"{number_to_string(duration, units, precision)}s"


def params_to_string(params_num: float, units: str | None = None, precision: int = 2) -> str:
    """A number of params, as ``"7.1 B"``: billions are B, not G."""
    text = number_to_string(params_num, "G" if units == "B" else units, precision)
    return text.replace("G", "B").strip()
