# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a slab live: device memory or host memory, behind one small protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from deepspeed.ops import pages
from deepspeed.utils import env
from deepspeed.utils.pin_memory import get_active_native_pinned_memory


class Tier(Protocol):
    """A place that holds flat buffers."""

    @property
    def device(self) -> torch.device:
        """The device on which a buffer of this tier can be computed with."""
        ...

    def alloc(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D buffer of zeros (padding must never hold garbage: norms read it)."""
        ...


@dataclass(frozen=True)
class DeviceTier:
    """The memory that computes the model."""

    device: torch.device

    def alloc(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D buffer of zeros on the device."""
        if self.device.type == "cpu":
            return pages.zeros(numel, dtype)
        return torch.zeros(numel, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class HostTier:
    """CPU memory, page-locked where that makes copies to a GPU asynchronous.

    `native`: the pages of DS_PIN_MEMORY_BACKEND=native, which are locked beside any device.
    """

    pinned: bool = False
    native: bool = False

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def alloc(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D buffer of zeros, page-locked if asked for and possible."""
        pins = get_active_native_pinned_memory() if self.native else None
        if pins is not None:
            return pins.empty(numel, dtype).zero_()
        if not self.pinned:
            return pages.zeros(numel, dtype)
        return page_locked(numel, dtype).zero_()


def page_locked(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D buffer beside a GPU, its contents undefined; torch lends its memory again when the GPU is done with it."""
    try:
        return torch.empty(numel, dtype=dtype, pin_memory=True, device="cpu")
    except RuntimeError:
        # The driver limits page-locked memory; pageable memory is slower but right.
        return torch.empty(numel, dtype=dtype, device="cpu")


def tier_for(device: torch.device, on_host: bool, pin_memory: bool) -> Tier:
    """The tier that holds state for a model on `device`; pinning by torch only means something beside a GPU."""
    if not on_host:
        return DeviceTier(device)
    native = pin_memory and env.DS_PIN_MEMORY_BACKEND.get() is not None
    return HostTier(pinned=pin_memory and device.type == "cuda", native=native)
