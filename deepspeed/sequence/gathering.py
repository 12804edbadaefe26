# SPDX-License-Identifier: Apache-2.0
"""A dimension that is split over ranks, made whole: each rank's share may be of another length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspeed import comm as dist


def gathered(values: Tensor, dim: int, group: Any) -> tuple[Tensor, list[int]]:
    """All ranks' shares joined along `dim`; differentiable.

    What the ranks make of the whole adds up in the gradient, so each rank must count its own part of the result only.

    Args:
        values: this rank's share; other dimensions are alike on all ranks.
        dim: the dimension that is split.
        group: the ranks; None is all of them.

    Returns:
        The whole, and the lengths of the shares.
    """
    sizes = lengths_of(values, dim, group)
    return _Gather.apply(values, dim, tuple(sizes), group), sizes


def lengths_of(values: Tensor, dim: int, group: Any) -> list[int]:
    """What each rank has along `dim`; a collective of them."""
    own = torch.tensor([values.shape[dim]], device=values.device)
    lengths = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, own, group=group)
    return [int(length) for length in lengths]


class _Gather(torch.autograd.Function):
    """The joined shares; its gradient is the sum, over the ranks, of theirs for this rank's share."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int, sizes: tuple[int, ...], group: Any) -> Tensor:
        ctx.way = (dim, sizes, group, values.shape)
        shapes = []
        for size in sizes:
            shape = list(values.shape)
            shape[dim] = size
            shapes.append(torch.Size(shape))
        sent = values.reshape(-1).repeat(len(sizes))
        numels = [shape.numel() for shape in shapes]
        received = values.new_empty(sum(numels))
        dist.all_to_all_single(received, sent, numels, [values.numel()] * len(sizes), group=group)
        parts = received.split(numels)
        return torch.cat([part.view(s) for part, s in zip(parts, shapes, strict=True)], dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dim, sizes, group, shape = ctx.way
        sent = [part.reshape(-1) for part in grads[0].split(list(sizes), dim)]
        received = grads[0].new_empty(len(sizes) * shape.numel())
        dist.all_to_all_single(
            received,
            torch.cat(sent),
            [shape.numel()] * len(sizes),
            [part.numel() for part in sent],
            group=group,
        )
        return received.view(len(sizes), *shape).sum(0), None, None, None
