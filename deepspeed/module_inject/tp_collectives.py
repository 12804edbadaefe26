# SPDX-License-Identifier: Apache-2.0
"""The collectives between tensor-parallel layers, each with its gradient.

[Note: Pairs]
A column layer computes some outputs from all inputs, and the row layer behind it takes just these. Forward, the column's
inputs are equal on all ranks as they are, and the row's partial sums are added up. Backward it is the other way around:
the row's gradients are equal as they are, and the column's partial input gradients are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis

from .tp_cut import Cut


class _SumOfGrads(torch.autograd.Function):
    """Nothing forward; backward, the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return summed(grad, ctx.axis), None


class _Sum(torch.autograd.Function):
    """Forward, the sum over the ranks; nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return summed(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Forward, all ranks' parts joined; backward, this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, cut: Cut) -> torch.Tensor:
        ctx.axis, ctx.cut = axis, cut
        return cut.join(gather_parts(x, -1, cut.by_rank, axis))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return ctx.cut.take(grad, ctx.axis.rank), None, None


class _OverlappedLinear(torch.autograd.Function):
    """A column layer's product whose input gradient travels while the weight's is computed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis = axis
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = handle = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(grad, weight).contiguous()
            handle = flat.all_reduce_(grad_x, ctx.axis, async_op=True)
        if ctx.needs_input_grad[1]:
            count = grad.shape[:-1].numel()  # -1 would be ambiguous where this rank has no heads
            rows = grad.reshape(count, grad.shape[-1])
            grad_weight = torch.matmul(rows.t(), x.reshape(count, x.shape[-1]))
        if handle is not None:
            handle.wait()
        return grad_x, grad_weight, None


def sum_of_grads(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return ``x``, the gradient of which is the sum of all ranks' gradients."""
    return x if axis.size == 1 else _SumOfGrads.apply(x, axis)  # type: ignore[no-untyped-call]


def sum_over_ranks(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return the sum of all ranks' ``x``; each gets the whole gradient."""
    return x if axis.size == 1 else _Sum.apply(x, axis)  # type: ignore[no-untyped-call]


def gather_columns(x: torch.Tensor, axis: Axis, cut: Cut) -> torch.Tensor:
    """Return all ranks' last dimensions joined as a weight's rows were cut; each gets its part of the gradient."""
    last = Cut(-1, cut.widths)
    return x if axis.size == 1 else _Gather.apply(x, axis, last)  # type: ignore[no-untyped-call]


def overlapped_linear(x: torch.Tensor, weight: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return ``linear(sum_of_grads(x), weight)``, whose backward sums and multiplies at once."""
    return _OverlappedLinear.apply(x, weight, axis)  # type: ignore[no-untyped-call]


def summed(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return the sum over the ranks, in memory of its own; no gradient."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    flat.all_reduce_(total, axis)
    return total


def gather_parts(
    part: torch.Tensor, dim: int, sizes: Sequence[int], axis: Axis
) -> list[torch.Tensor]:
    """Return all ranks' parts of a tensor that is divided along one dimension, which may be unevenly."""
    if axis.size == 1:
        return [part]
    first = part.detach().movedim(dim, 0)
    padded = first.new_zeros((max(sizes), *first.shape[1:]))
    padded[: first.shape[0]] = first
    everybody = padded.new_empty((axis.size, *padded.shape))
    flat.all_gather_into(everybody.view(-1), padded.view(-1), axis)
    return [whole[:size].movedim(0, dim) for whole, size in zip(everybody, sizes, strict=True)]
