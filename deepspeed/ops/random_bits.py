# SPDX-License-Identifier: Apache-2.0
"""Random bits for stochastic rounding: a hash of a seed and an element's index, in torch.

The native kernels compute the same (`noise` in csrc/cpu/isa_unit.inl, `random_bits` in csrc/cuda/base.cuh), so that the
result of a rounding depends on neither the device, nor the number of threads, nor the instruction set.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAREST = -1  # in the place of a seed: to nearest even, not by chance

_STEP = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def noise(seed: int, numel: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two int64 tensors of `numel` random 32-bit numbers, for the elements 0, 1, ... of a buffer."""
    x = torch.arange(1, numel + 1, device=device) * _signed(_STEP) + _signed(seed)
    x = (x ^ _right(x, 30)) * _signed(_FIRST)
    x = (x ^ _right(x, 27)) * _signed(_SECOND)
    x = x ^ _right(x, 31)
    return x & 0xFFFFFFFF, _right(x, 32)


def unit(seed: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Return fp32 numbers of [0, 1), one for each element of the shape."""
    _, high = noise(seed, shape.numel(), device)
    return ((high >> 8).float() * 2.0**-24).reshape(shape)


def draw_seed(stochastic: bool = True) -> int:
    """Draw a seed from torch's generator, so that manual_seed fixes stochastic rounding too.

    Args:
        stochastic: False draws nothing and returns `NEAREST`.
    """
    return int(torch.randint(1 << 62, (1,), device="cpu").item()) if stochastic else NEAREST


def rounding(seed: int) -> tuple[bool, int]:
    """Return what the kernels take for a seed: whether they round by chance, and the seed of it, else 0."""
    return (True, seed) if seed != NEAREST else (False, 0)


def to_bf16(values: Tensor, random: Tensor) -> Tensor:
    """Round fp32 values to bf16, up with the probability of what is cut off, by 16 random bits each.

    Args:
        values: fp32.
        random: int64 of the same shape; the low 16 bits are used.
    """
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    moved = torch.where(values.isnan(), bits | 0x400000, bits + (random & 0xFFFF))
    high = (moved >> 16) & 0xFFFF
    return torch.where(high >= 1 << 15, high - (1 << 16), high).to(torch.int16).view(torch.bfloat16)


def _right(x: Tensor, n: int) -> Tensor:
    """Shift in zeros."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >= 1 << 63 else number
