# SPDX-License-Identifier: Apache-2.0
"""Functions that round or choose, and let gradients pass as if they did not: fewer bits, and the best of some scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def fewer_bits(
    x: Tensor,
    bits: int,
    groups: int = 1,
    *,
    symmetric: bool = True,
    span: tuple[Tensor, Tensor] | None = None,
    stochastic: bool = False,
) -> Tensor:
    """Round values to the levels that `bits` bits can name, evenly spaced over the range of each group.

    Args:
        x: any float dtype; groups are consecutive runs of its values.
        bits: from 1; two to that power is the number of levels.
        groups: divides the number of values.
        symmetric: levels from minus the greatest magnitude, zero among them; else from the least to the greatest value.
        span: the range, in place of each group's own, as two 0-dim tensors.
        stochastic: up or down by chance, so that the mean is kept; else to the nearest.

    Returns:
        A tensor like `x`. A group without a range, such as zeros alone, stays as it is.
    """
    flat = x.float().reshape(groups, -1)
    low, high = (flat.amin(1, True), flat.amax(1, True)) if span is None else span
    levels = 2**bits
    if symmetric:
        scale = 2 * torch.maximum(low.abs(), high.abs()).float() / levels
        origin, first, last = torch.zeros_like(scale), -(levels // 2), levels // 2 - 1
    else:
        scale = (high - low).float() / levels
        safe = torch.where(scale > 0, scale, 1.0)
        origin, first, last = (low / safe).round() * safe, 0, levels - 1
    safe = torch.where(scale > 0, scale, 1.0)
    codes = (flat - origin) / safe
    codes = (codes + torch.rand_like(codes)).floor() if stochastic else codes.round()
    rounded = codes.clamp_(first, last) * safe + origin
    return torch.where(scale > 0, rounded, flat).reshape(x.shape).to(x.dtype)


def two_levels(x: Tensor, groups: int = 1) -> Tensor:
    """The sign of each value times the mean magnitude of its group."""
    flat = x.float().reshape(groups, -1)
    return (flat.sign() * flat.abs().mean(1, True)).reshape(x.shape).to(x.dtype)


def three_levels(x: Tensor, groups: int = 1) -> Tensor:
    """Values of small magnitude become 0, the others their sign times the mean magnitude of those others.

    Small is below 0.7 of the group's mean magnitude, as in "Ternary Weight Networks".
    """
    flat = x.float().reshape(groups, -1)
    size = flat.abs()
    large = size > 0.7 * size.mean(1, True)
    mean = (size * large).sum(1, True) / large.sum(1, True).clamp_min(1)
    return (flat.sign() * large * mean).reshape(x.shape).to(x.dtype)


def _span(low: Tensor | None, high: Tensor | None, groups: int) -> tuple[Tensor, Tensor] | None:
    if low is None or high is None:
        if low is not high:
            raise AssertionError("a range has both ends: give min_value and max_value, or neither")
        return None
    if groups != 1:
        raise AssertionError(f"a given range is for one group, got num_groups={groups}")
    return low, high


class SymQuantizer(torch.autograd.Function):
    """`fewer_bits` around zero: ``apply(input, num_bits, min_value=None, max_value=None, num_groups=1)``."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        num_bits: int,
        min_value: Tensor | None = None,
        max_value: Tensor | None = None,
        num_groups: int = 1,
    ) -> Tensor:
        """See `fewer_bits`."""
        return fewer_bits(input, num_bits, num_groups, span=_span(min_value, max_value, num_groups))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient as it comes."""
        return grad_output, None, None, None, None


class AsymQuantizer(SymQuantizer):
    """`fewer_bits` from the least value to the greatest, with the arguments of `SymQuantizer`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        num_bits: int,
        min_value: Tensor | None = None,
        max_value: Tensor | None = None,
        num_groups: int = 1,
    ) -> Tensor:
        """See `fewer_bits`."""
        span = _span(min_value, max_value, num_groups)
        return fewer_bits(input, num_bits, num_groups, symmetric=False, span=span)


def _without_range(name: str, bits: int, wanted: int, low: Any, high: Any) -> None:
    if bits != wanted or low is not None or high is not None:
        raise AssertionError(
            f"{name} is for {wanted} bit(s) and takes no range: got num_bits={bits}, "
            f"min_value={low}, max_value={high}"
        )


class TernaryQuantizer(SymQuantizer):
    """`three_levels`, with the arguments of `SymQuantizer`: two bits, no range."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        num_bits: int,
        min_value: Tensor | None = None,
        max_value: Tensor | None = None,
        num_groups: int = 1,
    ) -> Tensor:
        """See `three_levels`."""
        _without_range("TernaryQuantizer", num_bits, 2, min_value, max_value)
        return three_levels(input, num_groups)


class BinaryQuantizer(SymQuantizer):
    """`two_levels`, with the arguments of `SymQuantizer`: one bit, no range."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        num_bits: int,
        min_value: Tensor | None = None,
        max_value: Tensor | None = None,
        num_groups: int = 1,
    ) -> Tensor:
        """See `two_levels`."""
        _without_range("BinaryQuantizer", num_bits, 1, min_value, max_value)
        return two_levels(input, num_groups)


class TopKBinarizer(torch.autograd.Function):
    """1 where a score is among the best, 0 elsewhere: ``apply(inputs, threshold, sigmoid)``.

    The best are a share `threshold` of all, rounded up; of equal scores the first. With `sigmoid`, the share is the
    sigmoid of a 0-dim tensor `threshold`, which gets a gradient too.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, threshold: Any, sigmoid: bool) -> Tensor:
        """The mask, in the scores' shape and dtype."""
        share = float(torch.sigmoid(threshold)) if sigmoid else float(threshold)
        kept = min(math.ceil(share * inputs.numel()), inputs.numel())
        order = inputs.flatten().argsort(descending=True, stable=True)
        mask = torch.zeros_like(inputs).flatten()
        mask[order[:kept]] = 1
        mask = mask.view_as(inputs)
        ctx.save_for_backward(mask)
        ctx.sigmoid = sigmoid
        return mask

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient as it comes; the threshold gets the sum of that of the best."""
        (mask,) = ctx.saved_tensors
        return grad_output, (grad_output * mask).sum() if ctx.sigmoid else None, None
