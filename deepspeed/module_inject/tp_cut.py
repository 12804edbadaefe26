# SPDX-License-Identifier: Apache-2.0
"""Where a weight is cut for tensor-parallel ranks, as plain integers, and the cutting and joining itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed.utils.errors import explain

from .tp_shard import get_shard_size_list


@dataclass(frozen=True)
class Cut:
    """One cut; a weight in which several are joined is cut through each of these.

    Attributes:
        dim: the dimension that is divided; None for a weight that all ranks hold.
        widths: for each of the joined weights, its elements along `dim` on each rank.
    """

    dim: int | None
    widths: tuple[tuple[int, ...], ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of each joined weight along the dimension."""
        return tuple(sum(per_rank) for per_rank in self.widths)

    @property
    def by_rank(self) -> tuple[int, ...]:
        """What each rank holds along the dimension, of all joined weights together."""
        return tuple(sum(of_rank) for of_rank in zip(*self.widths, strict=True))

    def take(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """One rank's part of a whole tensor, in memory of its own.

        Raises:
            ValueError: the tensor is of another size.
        """
        assert self.dim is not None
        if whole.shape[self.dim] != sum(self.sizes):
            raise ValueError(
                explain(
                    "a tensor cannot be cut as its layer was",
                    got=f"shape {tuple(whole.shape)}",
                    expected=f"{sum(self.sizes)} elements in dimension {self.dim}",
                )
            )
        parts = [
            one.narrow(self.dim, sum(per_rank[:rank]), per_rank[rank])
            for one, per_rank in zip(whole.split(self.sizes, self.dim), self.widths, strict=True)
        ]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone()

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole of all ranks' parts."""
        assert self.dim is not None
        pieces = [
            part.split([per_rank[rank] for per_rank in self.widths], self.dim)
            for rank, part in enumerate(parts)
        ]
        return torch.cat([p[i] for i in range(len(self.widths)) for p in pieces], self.dim)


def sub_param_sizes(shape: Sequence[Any], dim: int, total: int) -> tuple[int, ...]:
    """The sizes of joined weights.

    Args:
        shape: how a rule tells them apart: at `dim` the number of equal ones, or the tuple of their sizes.
        dim: the dimension that is divided.
        total: its size.

    Raises:
        ValueError: they do not make up the whole.
    """
    entry = shape[dim]
    if isinstance(entry, (tuple, list)):
        sizes = tuple(int(n) for n in entry)
    else:
        count = 1 if int(entry) == -1 else int(entry)
        sizes = (total // count,) * count if count > 0 else ()
    if sum(sizes) != total:
        raise ValueError(
            explain(
                "the joined weights do not make up the layer's",
                got=f"shape {tuple(shape)} for dimension {dim} of size {total}",
                expected="a number that divides it, or sizes that add up to it",
            )
        )
    return sizes


def shard_widths(
    sub_param_sizes: Sequence[int], tp_world_size: int, name: str | None = None
) -> list[list[int]]:
    """How each of several joined weights is divided over the ranks."""
    return [get_shard_size_list(size, tp_world_size, name) for size in sub_param_sizes]
