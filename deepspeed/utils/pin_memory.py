# SPDX-License-Identifier: Apache-2.0
"""Page-locked host memory from the native library, in place of torch's: DS_PIN_MEMORY_BACKEND=native asks for it.

Torch rounds each page-locked allocation up to a power of two and keeps it; here a buffer takes the pages that it
needs, and gives them back with the last tensor that shares them, or when it is unpinned.
"""

from __future__ import annotations

import bisect
import importlib
import threading
from typing import Any

import torch

from deepspeed.ops.aio import buffers
from deepspeed.utils import env
from deepspeed.utils.errors import explain
from deepspeed.utils.pin_memory_tracker import track_pinned_memory


class NativePinnedMemory:
    """The page-locked buffers of this process, by address.

    Raises:
        RuntimeError: there is no native library, so nothing can be locked.
    """

    def __init__(self) -> None:
        if not buffers.can_lock():
            raise RuntimeError(
                explain(
                    "no memory can be page-locked without the native library",
                    fix="see ds_report for what it lacks, or unset DS_PIN_MEMORY_BACKEND",
                )
            )
        self._ranges: dict[int, int] = {}  # address -> bytes
        self._lock = threading.RLock()  # a buffer may die while one is looked up

    def pin(
        self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True
    ) -> torch.Tensor:
        """Return page-locked memory as large as a CPU tensor; ``ds_pinned`` is set on it.

        Args:
            tensor: gives numel and dtype.
            make_copy: with its contents; else they are undefined.
            match_shape: in its shape; else flat.

        Raises:
            MemoryError: there is not so much memory.
        """
        flat = self.empty(tensor.numel(), tensor.dtype)
        begin = flat.data_ptr()
        made = flat.view(tensor.shape) if match_shape else flat
        if make_copy:
            made.copy_(tensor if match_shape else tensor.reshape(-1))
        made.ds_pinned = True  # type: ignore[attr-defined]
        made.ds_pinned_at = begin  # type: ignore[attr-defined]
        return made

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a flat page-locked tensor, its contents undefined."""
        tensor = buffers.host_tensor(numel, dtype, self._forget)
        nbytes = numel * dtype.itemsize
        if nbytes:
            with self._lock:
                self._ranges[tensor.data_ptr()] = nbytes
            track_pinned_memory(nbytes)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Say whether a tensor, or what it is a view of, lies in a buffer from here."""
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
            return False
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # it has no storage
            return False
        with self._lock:
            begins = sorted(self._ranges)
            place = bisect.bisect_right(begins, address) - 1
            return place >= 0 and address < begins[place] + self._ranges[begins[place]]

    def unpin(self, tensor: torch.Tensor) -> bool:
        """Unlock the buffer that `pin` made of a tensor; returns whether there was one.

        Whatever the tensor holds by now, the memory that it was pinned in is meant. Tensors that still share it stay
        valid: it is freed with the last of them.
        """
        begin: Any = getattr(tensor, "ds_pinned_at", None)
        if begin is None:
            begin = tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0
        with self._lock:
            known = self._ranges.pop(begin, None) is not None
        if known:
            buffers.unlock_address(begin)
        return known

    def _forget(self, address: int) -> None:
        with self._lock:
            self._ranges.pop(address, None)


_shared_native_pins: NativePinnedMemory | None = None


def get_active_native_pinned_memory() -> NativePinnedMemory | None:
    """Return the manager that DS_PIN_MEMORY_BACKEND=native asks for; None for torch's.

    Raises:
        ValueError: DS_PIN_MEMORY_BACKEND is something else.
        RuntimeError: the native library is missing.
    """
    global _shared_native_pins
    backend = (env.DS_PIN_MEMORY_BACKEND.get() or "torch").lower()
    if backend not in ("torch", "native"):
        raise ValueError(
            explain(
                "no such backend of page-locked memory",
                got=f"DS_PIN_MEMORY_BACKEND={backend}",
                expected="torch or native",
            )
        )
    if backend == "torch":
        return None
    if _shared_native_pins is None:
        builders = importlib.import_module("deepspeed.ops.op_builder")
        builders.PinMemoryBuilder().load()
        _shared_native_pins = NativePinnedMemory()
    return _shared_native_pins
