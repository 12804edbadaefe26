# SPDX-License-Identifier: Apache-2.0
"""The collectives of tensor-parallel layers as operators, so that a graph goes through them.

They do what module_inject/tp_collectives.py does between eager layers; its [Note: Pairs] says why. The group is the
current tensor-parallel one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from deepspeed import comm as dist
from deepspeed.utils import groups

_library: torch.library.Library | None = None


def define_ops() -> None:
    """Make `torch.ops.dc.tp_all_reduce` and `tp_all_gather`; a second call does nothing."""
    global _library
    if _library is not None:
        return
    library = torch.library.Library("dc", "FRAGMENT")
    library.define("tp_all_reduce(Tensor x) -> Tensor")
    library.define("tp_all_gather(Tensor x, int[] sizes) -> Tensor")
    library.impl("tp_all_reduce", all_reduce_in_tp_region, "CompositeExplicitAutograd")
    library.impl("tp_all_gather", gather_from_tp_region, "CompositeExplicitAutograd")
    library.impl("tp_all_reduce", _like, "Meta")
    library.impl("tp_all_gather", _joined_like, "Meta")
    _library = library


def get_tp_group() -> Any:
    """The current tensor-parallel group."""
    return groups.get_tensor_model_parallel_group()


def all_reduce_in_tp_region(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over the ranks, in memory of its own."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=get_tp_group())
    return total


def gather_from_tp_region(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return all ranks' last dimensions, of `sizes`, joined."""
    group = get_tp_group()
    padded = x.new_zeros((*x.shape[:-1], max(sizes)))
    padded[..., : x.shape[-1]] = x
    ranks = dist.get_world_size(group=group)
    everybody = padded.new_empty((ranks * padded.shape[0], *padded.shape[1:]))
    dist.all_gather_into_tensor(everybody, padded, group=group)
    parts = everybody.view(ranks, *padded.shape)
    own = dist.get_rank(group=group)
    pieces = [part[..., :size] for part, size in zip(parts, sizes, strict=True)]
    pieces[own] = x
    return torch.cat(pieces, dim=-1)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _joined_like(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sum(sizes)))


class _Sum(torch.autograd.Function):
    """Forward, the sum over the ranks; nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.dc.tp_all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _SumOfGrads(torch.autograd.Function):
    """Nothing forward; backward, the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.ops.dc.tp_all_reduce(grad)


class _Gather(torch.autograd.Function):
    """Forward, all ranks' last dimensions joined; backward, this rank's part."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sizes: list[int], start: int, length: int
    ) -> torch.Tensor:
        ctx.start, ctx.length = start, length
        return torch.ops.dc.tp_all_gather(x, sizes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad.narrow(-1, ctx.start, ctx.length), None, None, None


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of all ranks' `x`; each gets the whole gradient."""
    return _Sum.apply(x)  # type: ignore[no-untyped-call]


def sum_of_grads(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, the gradient of which is the sum of all ranks' gradients."""
    return _SumOfGrads.apply(x)  # type: ignore[no-untyped-call]


def gather_columns(x: torch.Tensor, sizes: Sequence[int], rank: int) -> torch.Tensor:
    """Return all ranks' last dimensions joined; each gets its part of the gradient."""
    start = list(itertools.accumulate(sizes, initial=0))[rank]
    return _Gather.apply(x, list(sizes), start, sizes[rank])  # type: ignore[no-untyped-call]
