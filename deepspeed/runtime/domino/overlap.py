# SPDX-License-Identifier: Apache-2.0
"""Sums over tensor-parallel ranks that start at one place of a graph and are waited for at another.

[Note: Half and half]
Domino (arXiv:2409.15241) computes two halves of a batch in turn, so that the sum which one of them needs travels while the
other is computed. Forward, a sum starts behind a row layer and is waited for where its result is used. Backward, the sum of
a column layer's input gradients starts in that layer's backward pass and is waited for at a mark that was placed before
the column layers of both halves: autograd comes to what was recorded earlier last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.torch_autocast import autocast_of


class Pending:
    """A sum that has started."""

    def __init__(self, handle: Any = None) -> None:
        self.handle = handle

    def wait(self) -> None:
        """Come back when it is done; at once if none has started."""
        if self.handle is not None:
            self.handle.wait()
            self.handle = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: Axis, pending: Pending) -> Tensor:
        total = partial.detach().clone(memory_format=torch.contiguous_format)
        pending.handle = flat.all_reduce_(total, axis, async_op=True)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, pending: Pending) -> Tensor:
        pending.wait()
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: Pending) -> Tensor:
        ctx.pending = pending
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.pending.wait()
        return grads[0], None


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, pending: Pending
    ) -> Tensor:
        # here, not before the mark: autograd would turn gradients back before their sum is there
        own, (casts, narrow) = x.dtype, autocast_of(x.device.type)
        if casts and own != torch.float64:
            x, weight = x.to(narrow), weight.to(narrow)
            bias = None if bias is None else bias.to(narrow)
        ctx.own = own
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.pending, ctx.has_bias = axis, pending, bias is not None
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        to_x = torch.matmul(grad, weight).to(ctx.own).contiguous()
        ctx.pending.handle = flat.all_reduce_(to_x, ctx.axis, async_op=True)
        rows = grad.reshape(-1, grad.shape[-1])
        to_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        return to_x, to_weight, rows.sum(0) if ctx.has_bias else None, None, None


def start_sum(partial: Tensor, axis: Axis, pending: Pending) -> Tensor:
    """The sum of all ranks' `partial`, which may be used behind `finish_sum` only."""
    return partial if axis.size == 1 else _Start.apply(partial, axis, pending)  # type: ignore[no-untyped-call]


def finish_sum(total: Tensor, pending: Pending) -> Tensor:
    """Wait for a sum."""
    return total if pending.handle is None else _Finish.apply(total, pending)  # type: ignore[no-untyped-call]


def mark(x: Tensor, axis: Axis, pending: Pending) -> Tensor:
    """`x`, before it goes into `column` with the same `pending`; see [Note: Half and half]."""
    return x if axis.size == 1 else _Mark.apply(x, pending)  # type: ignore[no-untyped-call]


def column(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, pending: Pending) -> Tensor:
    """This rank's outputs; the gradient of `x` is summed over the ranks."""
    if axis.size == 1:
        return nn.functional.linear(x, weight, bias)
    return _Column.apply(x, weight, bias, axis, pending)  # type: ignore[no-untyped-call]
