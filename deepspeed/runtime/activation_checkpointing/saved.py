# SPDX-License-Identifier: Apache-2.0
"""How the inputs of a checkpointed block wait for its backward pass: whole or in parts, on the device or in host memory.

The inputs of a block of a tensor-parallel model are equal on all of its ranks, so each may keep one part and gather
the others when the time comes (ZeRO-R, arXiv:1910.02054 §5.1).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

_Key = tuple[int, int, torch.dtype, torch.device]


class _Shelf:
    """One buffer with a row for each checkpointed block, and which rows are free."""

    def __init__(self, rows: int, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.empty(rows, numel, dtype=dtype, device=device)
        self.free = list(range(rows))


class Arena:
    """Contiguous memory for saved inputs, so that they do not fragment the allocator's.

    Args:
        rows: blocks that wait for their backward pass at one time, at most; more than that use memory of their own.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._shelves: dict[_Key, _Shelf] = {}
        self._told = False

    def place(self, values: torch.Tensor, position: int, owner: object) -> torch.Tensor:
        """Copy flat `values` into a free row; the row is free again when `owner` dies."""
        key = (position, values.numel(), values.dtype, values.device)
        shelf = self._shelves.get(key)
        if shelf is None:
            shelf = self._shelves[key] = _Shelf(self.rows, *key[1:])
        if not shelf.free:
            if not self._told:
                logger.warning(
                    f"more than number_checkpoints={self.rows} checkpointed blocks wait for their backward pass; "
                    "the rest use memory outside the contiguous buffer"
                )
                self._told = True
            return values.clone()
        row = shelf.free.pop()
        weakref.finalize(owner, shelf.free.append, row).atexit = False
        return shelf.buffer[row].copy_(values)


@dataclass(frozen=True)
class Policy:
    """Where saved inputs wait.

    Attributes:
        axis: ranks that keep one part each; an axis of one rank keeps inputs whole.
        on_host: keep them in CPU memory.
        arena: where parts are laid side by side; None for memory of their own.
    """

    axis: Axis
    on_host: bool = False
    arena: Arena | None = None

    @property
    def is_plain(self) -> bool:
        """Inputs are kept as they are."""
        return self.axis.size == 1 and not self.on_host and self.arena is None


class Kept:
    """One saved tensor; `restore` gives back its values.

    Args:
        tensor: the input, equal on all ranks of `policy.axis` if it is to be cut.
        policy: where it waits. Integer tensors (masks, positions) and tensors smaller than the axis stay whole.
        position: which of the block's inputs it is.
    """

    def __init__(self, tensor: torch.Tensor, policy: Policy, position: int) -> None:
        self.shape, self.device = tensor.shape, tensor.device
        self.cut = self.moved = False
        values = tensor.detach()
        heavy = tensor.is_floating_point() and tensor.layout == torch.strided
        if heavy and policy.axis.size > 1 and tensor.numel() >= policy.axis.size:
            self.cut, self.axis = True, policy.axis
            values = _own_part(values, policy.axis)
        if heavy and policy.on_host and tensor.device.type != "cpu":
            self.moved = True
            there = get_accelerator().pin_empty_like(values)
            # in the order of the stream that also brings it back, so nobody has to wait here
            values = there.copy_(values, non_blocking=True)
        elif heavy and policy.arena is not None:
            self.moved = True
            values = policy.arena.place(values.reshape(-1), position, self)
        self.values = values
        self.version = None if self.cut or self.moved or tensor.is_inference() else tensor._version

    def restore(self) -> torch.Tensor:
        """The input's values, outside any graph. Collective over the axis if the input was cut.

        Raises:
            RuntimeError: the input was kept where it is and has been written to since.
        """
        if self.version is not None and self.values._version != self.version:
            raise RuntimeError(
                explain(
                    "an input of a checkpointed block was modified in place before its backward pass",
                    got=f"version {self.values._version} of a tensor of shape {tuple(self.shape)}",
                    expected=f"version {self.version}",
                    fix="Give the block a clone, or do not write to the tensor.",
                )
            )
        values = self.values
        if self.moved:
            values = values.to(self.device, non_blocking=True)
        if self.cut:
            values = _gathered(values, self.shape.numel(), self.axis)
        return values.view(self.shape) if self.cut or self.moved else values


def _own_part(values: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A copy of this rank's part of the flattened values; the last part is padded with zeros."""
    size = -(-values.numel() // axis.size)
    part = values.reshape(-1)[axis.rank * size : (axis.rank + 1) * size]
    own = values.new_zeros(size)
    own[: part.numel()].copy_(part)
    return own


def _gathered(part: torch.Tensor, numel: int, axis: Axis) -> torch.Tensor:
    whole = part.new_empty(part.numel() * axis.size)
    flat.all_gather_into(whole, part, axis)
    return whole[:numel]
