# SPDX-License-Identifier: Apache-2.0
"""Buffers for the fastest file I/O: on page boundaries, and kept in memory where the system lets us."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from deepspeed.ops import abi, native
from deepspeed.ops.aio.library import functions
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

# address -> bytes, of memory that is locked now
_locked: dict[int, int] = {}
# addresses of buffers that torch locked, until they are unlocked or gone
_locked_by_torch: set[int] = set()


def locked_tensor(numel: int, dtype: torch.dtype) -> Tensor:
    """Return a 1-D CPU tensor for file I/O, its contents undefined.

    Beside a CUDA device it is page-locked for both; else its memory starts on a page and is locked as far as the
    system's limit allows (`is_locked` tells). It is freed with the last tensor that shares it.

    Raises:
        ValueError: a negative number of elements.
        MemoryError: there is not so much memory.
    """
    if torch.cuda.is_available():
        _check_count(numel)
        tensor = torch.empty(numel, dtype=dtype, device="cpu", pin_memory=True)
        if numel:
            _locked_by_torch.add(tensor.data_ptr())
            weakref.finalize(tensor, _locked_by_torch.discard, tensor.data_ptr()).atexit = False
        return tensor
    return _allocate(numel, dtype, lock=True)


def aligned_tensor(numel: int, dtype: torch.dtype) -> Tensor:
    """Return a 1-D CPU tensor as `locked_tensor` does, that the system may move: for much, or for long.

    Beside a CUDA device it is page-locked all the same, because copies from the device want it.

    Raises:
        ValueError: a negative number of elements.
        MemoryError: there is not so much memory.
    """
    if torch.cuda.is_available():
        return locked_tensor(numel, dtype)
    return _allocate(numel, dtype, lock=False)


def host_tensor(numel: int, dtype: torch.dtype, gone: Callable[[int], None]) -> Tensor:
    """Return a 1-D tensor of locked memory, beside a CUDA device too; `gone` is told its address when it is freed.

    Raises:
        ValueError: a negative number of elements.
        MemoryError: there is not so much memory.
    """
    return _allocate(numel, dtype, lock=True, gone=gone)


def can_lock() -> bool:
    """Say whether the native library, which locks memory, is there."""
    return functions() is not None


def _check_count(numel: int) -> None:
    if numel < 0:
        raise ValueError(explain("a buffer cannot have so many elements", got=numel))


def _allocate(
    numel: int, dtype: torch.dtype, lock: bool, gone: Callable[[int], None] | None = None
) -> Tensor:
    _check_count(numel)
    bound = functions()
    nbytes = numel * dtype.itemsize
    if bound is None or nbytes == 0:
        return torch.empty(numel, dtype=dtype, device="cpu")
    args = abi.IoMemoryArgs(size=ctypes.sizeof(abi.IoMemoryArgs), locked=lock, bytes=nbytes)
    if bound.alloc(ctypes.byref(args)):
        raise MemoryError(explain("no memory for a buffer of file I/O", got=native.last_error()))
    if args.locked:
        _locked[args.memory] = nbytes
    elif lock:
        logger.info("%d bytes for file I/O stay unlocked: the system's limit is lower", nbytes)
    memory = (ctypes.c_char * nbytes).from_address(args.memory)
    weakref.finalize(memory, _free, args.memory).atexit = False
    if gone is not None:
        weakref.finalize(memory, gone, args.memory).atexit = False
    return torch.frombuffer(memory, dtype=dtype)


def unlock(tensor: Tensor) -> bool:
    """Let the system move a buffer's memory again; returns whether it was locked by `locked_tensor`."""
    return unlock_address(tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0)


def unlock_address(address: int) -> bool:
    """`unlock` for the buffer that starts at an address; torch's own stays locked until it is gone."""
    if address in _locked_by_torch:
        _locked_by_torch.discard(address)
        return True
    nbytes = _locked.pop(address, 0)
    bound = functions()
    if nbytes and bound is not None:
        bound.unlock(address, nbytes)
    return nbytes > 0


def is_locked(tensor: Tensor) -> bool:
    """Say whether a tensor's memory is page-locked, by `locked_tensor` or by CUDA."""
    if tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().data_ptr() in _locked or tensor.is_pinned()


def _free(address: int) -> None:
    bound = functions()
    if bound is None:
        return
    nbytes = _locked.pop(address, 0)
    if nbytes:
        bound.unlock(address, nbytes)
    bound.free(address)
