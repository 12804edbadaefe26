# SPDX-License-Identifier: Apache-2.0
"""Memory that is used again as soon as nobody refers to it.

[Note: Why not the C library]
Stage 3 takes and drops blocks of some MB thousands of times in a step. The C library puts each where it finds room, so
that over a step a process comes to hold far more than is ever in use at once; told to give all of it back at once, it
pays for new pages every time. GPUs have an allocator that does what this does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

# Smaller blocks are the C library's: it keeps them together.
_LEAST_BYTES = 1 << 20
# Idle bytes beyond what was in use at the fullest moment: sizes take turns.
_SPARE_BYTES = 16 << 20

_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class Blocks:
    """Blocks of host memory, each lent as one flat tensor.

    A block is idle once nothing refers to its storage: no tensor, no view, nothing that autograd saved. So nobody has
    to give anything back, and whoever keeps a reference keeps the values. Idle blocks never make the whole
    larger than it was at its fullest moment, but for some MB.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.UntypedStorage] = []
        self._fullest = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Blocks], tuple[()]]:
        # A copy of a module copies its hooks, and with them this; a lock cannot be copied, nor need the memory be.
        return Blocks, ()

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A flat tensor, its contents undefined."""
        nbytes = numel * dtype.itemsize
        if device.type != "cpu" or nbytes < _LEAST_BYTES or _use_count is None:
            return torch.empty(numel, dtype=dtype, device=device)
        with self._lock:
            block = self._idle_block(nbytes)
            return torch.empty(0, dtype=dtype, device="cpu").set_(block, 0, (numel,), (1,))

    def _idle_block(self, nbytes: int) -> torch.UntypedStorage:
        idle = [block for block in self._blocks if not _in_use(block)]
        used = _bytes_of(self._blocks) - _bytes_of(idle)
        fitting = [block for block in idle if nbytes <= block.nbytes() <= 2 * nbytes]
        if fitting:
            found = min(fitting, key=torch.UntypedStorage.nbytes)
            self._fullest = max(self._fullest, used + found.nbytes())
            return found
        self._fullest = max(self._fullest, used + nbytes)
        while idle and used + _bytes_of(idle) + nbytes > self._fullest + _SPARE_BYTES:
            oldest = idle.pop(0)
            self._blocks = [block for block in self._blocks if block is not oldest]
            del oldest
        self._blocks.append(torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage())
        return self._blocks[-1]

    def clear(self) -> None:
        """Give the idle blocks back; the others go with their last users."""
        with self._lock:
            self._blocks.clear()
            self._fullest = 0


def _bytes_of(blocks: list[torch.UntypedStorage]) -> int:
    return sum(block.nbytes() for block in blocks)


def _in_use(block: torch.UntypedStorage) -> bool:
    """Whether anything but this list refers to a block."""
    return _use_count is None or _use_count(block._cdata) > 1
