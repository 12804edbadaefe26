# SPDX-License-Identifier: Apache-2.0
"""Checksums of files and of their pieces: CRC-32, which everything reads, taken of many pieces at once.

A checkpoint is hashed so that damage is found, not forgery: whoever can change a file can change the manifest beside
it. CRC-32 finds every flip of up to 32 neighbouring bits, costs a fraction of a cryptographic hash, is the sum that the
zip format wants anyway, and the sums of two pieces give the sum of both, so pieces may be summed in any order.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deepspeed.ops import native

CRC32 = "crc32"
SHA256 = "sha256"
"""What manifests of format 1 hold; read, and written no more."""

_POLYNOMIAL = 0xEDB88320
_PIECE = 1 << 20
_ONE_THREAD = 1 << 22
_BY_LIBRARY = 1 << 10


def crc32(data: Any, value: int = 0) -> int:
    """The CRC-32 of contiguous bytes, continued from `value`; other threads run meanwhile."""
    view = memoryview(data).cast("B")
    function = _native() if view.nbytes >= max(_BY_LIBRARY, 1) else None
    if function is None:
        return zlib.crc32(view, value)
    return function(_address(view), view.nbytes, value)


def crc32_of_address(address: int, nbytes: int, value: int = 0) -> int:
    """The CRC-32 of `nbytes` bytes of memory at an address."""
    function = _native()
    if function is not None:
        return function(address, nbytes, value)
    return zlib.crc32((ctypes.c_char * nbytes).from_address(address), value) if nbytes else value


def copy_and_sum(source: int, target: int, nbytes: int) -> int:
    """Copy `nbytes` bytes of memory from one address to another; returns their CRC-32."""
    function = _native_copy()
    if function is not None:
        return function(source, target, nbytes, 0)
    ctypes.memmove(target, source, nbytes)
    return crc32_of_address(source, nbytes)


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two pieces in a row, from the CRC-32 of each and the length of the second in bytes."""
    return _times(_shift(length), first) ^ second if length else first


def combine_all(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of pieces in a row, each given as its CRC-32 and its length in bytes."""
    total = 0
    for value, length in parts:
        total = combine(total, value, length)
    return total


def of_file(path: Path, algorithm: str = CRC32) -> str:
    """The checksum of a file's content as hexadecimal digits.

    Raises:
        ValueError: no algorithm of that name.
        OSError: the file cannot be read.
    """
    if algorithm == SHA256:
        return _sha256(path)
    if algorithm != CRC32:
        raise ValueError(f"no checksum is named {algorithm!r}")
    size = path.stat().st_size
    if size == 0:
        return text_of(0)
    share = max(_PIECE, -(-size // threads()))

    def stretch(begin: int) -> tuple[int, int]:
        return _sum_of(path, begin, min(share, size - begin))

    return text_of(combine_all(in_parallel(stretch, range(0, size, share), size)))


def _sum_of(path: Path, begin: int, length: int) -> tuple[int, int]:
    """The CRC-32 of a part of a file and the part's length.

    Its bytes pass through a small piece of memory: a file mapped whole, or read into new memory, takes longer.
    """
    value, left = 0, length
    with open(path, "rb", buffering=0) as file, memoryview(bytearray(min(_PIECE, length))) as piece:
        file.seek(begin)
        while left:
            got = file.readinto(piece[:left])
            if not got:
                raise OSError(f"{path} ends before byte {begin + length}")
            value = crc32(piece[:got], value)
            left -= got
    return value, length


def in_parallel(action: Callable[[int], Any], items: Iterable[int], nbytes: int) -> list[Any]:
    """The results of `action` for each item in their order, by a few threads if `nbytes` are worth it."""
    if nbytes < _ONE_THREAD:
        return [action(item) for item in items]
    with ThreadPoolExecutor(threads(), "checksum") as pool:
        return list(pool.map(action, items))


def threads() -> int:
    """How many threads sum at once."""
    return max(1, min(4, os.cpu_count() or 1))


def text_of(value: int) -> str:
    """A CRC-32 as a manifest writes it."""
    return f"{value:08x}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_PIECE):
            digest.update(chunk)
    return digest.hexdigest()


@functools.cache
def _function(library: native.NativeLibrary, name: str, addresses: int) -> Any:
    arguments = [ctypes.c_void_p] * addresses + [ctypes.c_int64, ctypes.c_uint32]
    try:
        return library.function(name, *arguments, result=ctypes.c_uint32)
    except AttributeError:  # a library of before
        return None


def _native() -> Any:
    return _of_library("ds_crc32", 1)


def _native_copy() -> Any:
    return _of_library("ds_copy_crc32", 2)


def _of_library(name: str, addresses: int) -> Any:
    try:
        library = native.opened()
    except native.NativeLibraryError:  # said where an op is asked for; a sum can do without
        return None
    return None if library is None else _function(library, name, addresses)


def _address(view: memoryview) -> int:
    if not view.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    import numpy

    return numpy.frombuffer(view, dtype=numpy.uint8).ctypes.data


# - arithmetic of polynomials over two elements, bits reversed, modulo the CRC's polynomial


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=256)
def _shift(length: int) -> int:
    """x to the power of the number of bits in `length` bytes."""
    result, power = 1 << 31, 1 << 23  # x^0, x^8
    while length:
        if length & 1:
            result = _times(power, result)
        length >>= 1
        power = _times(power, power)
    return result
