# SPDX-License-Identifier: Apache-2.0
"""Products of runs of rows with one matrix each, and the order in which rows make such runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# grouped products read rows of this many bytes
_ROW_ALIGNMENT = 16


class _ScaledGrad(torch.autograd.Function):
    """Nothing forward; backward, the gradient times a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.factor, None


def scale_grad(x: Tensor, factor: float) -> Tensor:
    """Return ``x``, whose gradient is multiplied by ``factor``."""
    return x if factor == 1.0 else _ScaledGrad.apply(x, factor)  # type: ignore[no-untyped-call]


def source_to_expert_order(counts_by_source: Tensor) -> Tensor:
    """The order that brings rows, which came source by source, together by expert.

    Args:
        counts_by_source: [sources, experts] rows of each source for each expert; a source's rows are sorted by expert.

    Returns:
        Indices of the rows, int64: `rows[order]` is sorted by expert, and by source within.
    """
    sources, experts = counts_by_source.shape
    numbers = torch.arange(experts, device=counts_by_source.device).repeat(sources)
    of_row = torch.repeat_interleave(numbers, counts_by_source.reshape(-1).to(torch.int64))
    return torch.argsort(of_row, stable=True)


def inverse_order(order: Tensor) -> Tensor:
    """The order that undoes `order`, a permutation of indices: `rows[order][inverse_order(order)]` is `rows`."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return back


def grouped_mm_available(rows: Tensor, weights: Tensor) -> bool:
    """Whether torch has one kernel for all experts' products of these tensors."""
    if not (rows.is_cuda and rows.dtype == weights.dtype == torch.bfloat16):
        return False
    if _grouped_mm() is None or torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False
    return all(n * rows.element_size() % _ROW_ALIGNMENT == 0 for n in weights.shape[1:])


def grouped_product(rows: Tensor, weights: Tensor, counts: Tensor, grouped: bool) -> Tensor:
    """Multiply each expert's run of rows with its matrix.

    Args:
        rows: [T, in], sorted by expert.
        weights: [experts, out, in].
        counts: [experts] rows of each expert, integers that add up to T.
        grouped: use one kernel for all, where `grouped_mm_available`.

    Returns:
        [T, out]; each expert's weights get a gradient, zero where it had no rows.
    """
    kernel = _grouped_mm()
    if grouped and kernel is not None and rows.shape[0]:
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        product: Tensor = kernel(rows, weights.transpose(-2, -1), offs=ends)
        return product
    parts = rows.split(counts.tolist())
    # experts without rows take part too: a gradient of zero is not a missing one
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])


def _grouped_mm() -> Callable[..., Tensor] | None:
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public if public is not None else getattr(torch, "_grouped_mm", None)
