# SPDX-License-Identifier: Apache-2.0
"""A dimension that is split over ranks, made whole: each rank's share may be of another length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layer import exchange, lengths_of


def gathered(values: Tensor, dim: int, group: Any) -> tuple[Tensor, list[int]]:
    """All ranks' shares joined along `dim`; differentiable.

    What the ranks make of the whole adds up in the gradient, so each rank must count its own part of the result only.

    Args:
        values: this rank's share; other dimensions are alike on all ranks.
        dim: the dimension that is split, counted from 0.
        group: the ranks; None is all of them.

    Returns:
        The whole, and the lengths of the shares.
    """
    sizes = lengths_of(values, dim, group)
    copies = values.expand(len(sizes), *values.shape)  # one for each rank
    whole = exchange(copies, 0, dim + 1, [1] * len(sizes), sizes, group)
    return whole.squeeze(0), sizes
