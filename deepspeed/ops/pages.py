# SPDX-License-Identifier: Apache-2.0
"""Large flat buffers on large pages, where the system gives them on request.

An optimizer step streams through gigabytes once; with 4 KiB pages a good part of its time goes to address translation,
most of all in a virtual machine. Linux hands out 2 MiB pages to memory that asks for them (`madvise`); elsewhere, and
where the system is set to give them never or always, asking changes nothing. Such a buffer is a mapping of its own, which goes back to the
system as soon as it is freed; the C library would keep it for later, and hold memory that nobody uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_HUGE_PAGE = 2 * 1024 * 1024
_MADV_HUGEPAGE = 14
# Smaller buffers would round up to memory that nobody uses.
_WORTH_IT = 4 * _HUGE_PAGE


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError, AttributeError):
        function = ctypes.CDLL(None).madvise
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return function
    return None


def zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """A flat CPU tensor of zeros, on large pages where that is possible and worth it."""
    advise = _madvise()
    nbytes = numel * dtype.itemsize
    if advise is None or nbytes < _WORTH_IT:
        return torch.zeros(numel, dtype=dtype, device="cpu")
    buffer = torch.frombuffer(
        mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype
    )
    # Before the first touch: the system gives pages when they are written to.
    begin = -(-buffer.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (buffer.data_ptr() + nbytes) // _HUGE_PAGE * _HUGE_PAGE
    advise(begin, end - begin, _MADV_HUGEPAGE)
    return buffer
