# SPDX-License-Identifier: Apache-2.0
"""Which columns of a matrix matter most, and where their elements lie in a flat shard.

A shard may begin and end anywhere in a parameter, so a part of it is seen as rectangles: runs of whole rows, and pieces of
a row at the ends. Parameters of one dimension have no columns: all of them is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..zero.own_slice import numel_of, shape_of
from ..zero.shard_group import ShardGroup, ShardPart


@dataclass(frozen=True)
class Block:
    """Rows of a parameter in a part, or a piece of one row.

    Attributes:
        param: index of the parameter in its group.
        start: where the first element lies in the part.
        rows, width: size.
        first: the column that it begins with.
        is_matrix: whether the parameter has columns.
    """

    param: int
    start: int
    rows: int
    width: int
    first: int
    is_matrix: bool

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The block in a flat tensor of the part, as a matrix."""
        return flat.narrow(0, self.start, self.rows * self.width).view(self.rows, self.width)


def width_of(param: torch.nn.Parameter) -> int:
    """Columns of a parameter seen as a matrix of its first dimension by all others; 0 for one dimension or none."""
    shape = shape_of(param)
    return numel_of(param) // shape[0] if len(shape) > 1 and shape[0] else 0


def blocks_of(group: ShardGroup, part: ShardPart) -> list[Block]:
    """The blocks of a part, by position."""
    found = []
    for segment in group.layout.segments(group.shard_axis.rank):
        width = width_of(group.params[segment.param])
        for other, offset, start, length in group.runs(segment.shard_start, segment.length):
            if other is part:
                found += _cut(segment.param, start, segment.param_start + offset, length, width)
    return found


def _cut(param: int, start: int, at: int, length: int, width: int) -> list[Block]:
    """The rectangles of a run of `length` elements that begins at element `at` of a matrix of `width` columns."""
    if not width:
        return [Block(param, start, 1, length, 0, is_matrix=False)]
    found, done = [], 0
    while done < length:
        first = (at + done) % width
        rows = (length - done) // width if first == 0 else 0
        size = rows * width if rows else min(width - first, length - done)
        found.append(Block(param, start + done, max(rows, 1), size // max(rows, 1), first, True))
        done += size
    return found


def column_squares(group: ShardGroup) -> list[torch.Tensor]:
    """The sum of squares of each column of this rank's gradients: a float64 vector a parameter, on the CPU."""
    squares = [
        torch.zeros(width_of(param), dtype=torch.float64, device="cpu") for param in group.params
    ]
    for part in group.parts:
        grad = group.grad_of(part)
        for block in blocks_of(group, part):
            if block.is_matrix:
                norms = torch.linalg.vector_norm(block.of(grad), dim=0, dtype=torch.float64)
                squares[block.param][block.first :][: block.width] += norms.square().cpu()
    return squares


def top_columns(squares: torch.Tensor, ratio: float) -> torch.Tensor:
    """The columns with the largest squares, a share of `ratio` of them (at least one, unless it is 0), in order."""
    count = min(len(squares), math.ceil(ratio * len(squares) - 1e-9))
    order = squares.sort(descending=True, stable=True).indices
    return order[:count].sort().values


class Columns:
    """The chosen elements of a part, as one flat vector.

    Args:
        blocks: of the part.
        chosen: the columns of each block, counted from its own first one; None is all of it.
    """

    def __init__(self, blocks: Sequence[Block], chosen: Sequence[torch.Tensor | None]) -> None:
        self._blocks = [
            (block, columns)
            for block, columns in zip(blocks, chosen, strict=True)
            if columns is None or len(columns)
        ]
        self._moved: dict[torch.device, list[torch.Tensor | None]] = {}
        self.sizes = [b.rows * (b.width if c is None else len(c)) for b, c in self._blocks]
        self.numel = sum(self.sizes)

    @classmethod
    def of_params(cls, blocks: Sequence[Block], chosen: Sequence[torch.Tensor]) -> Columns:
        """Choose columns by parameter; parameters without columns as a whole."""
        picked: list[torch.Tensor | None] = []
        for block in blocks:
            columns = chosen[block.param] - block.first
            inside = (columns >= 0) & (columns < block.width)
            picked.append(columns[inside] if block.is_matrix else None)
        return cls(blocks, picked)

    @classmethod
    def of_mask(cls, blocks: Sequence[Block], mask: torch.Tensor) -> Columns:
        """Choose what `mask` gave of an earlier choice."""
        rows = [block.of(mask)[0] if block.is_matrix else None for block in blocks]
        return cls(blocks, [None if row is None else row.nonzero().view(-1) for row in rows])

    def mask(self, length: int) -> torch.Tensor:
        """Which elements of the part are chosen: bool, of `length` elements."""
        mask = torch.zeros(length, dtype=torch.bool, device="cpu")
        self.put(mask, torch.ones(self.numel, dtype=torch.bool, device="cpu"))
        return mask

    def _on(self, device: torch.device) -> list[torch.Tensor | None]:
        if device not in self._moved:
            self._moved[device] = [None if c is None else c.to(device) for _, c in self._blocks]
        return self._moved[device]

    def take(self, flat: torch.Tensor) -> torch.Tensor:
        """The chosen elements of a flat tensor of the part: a new vector beside it."""
        if not self._blocks:
            return flat.new_empty(0)
        found = []
        for (block, _), columns in zip(self._blocks, self._on(flat.device), strict=True):
            whole = block.of(flat)
            found.append((whole if columns is None else whole.index_select(1, columns)).reshape(-1))
        return torch.cat(found)

    def put(self, flat: torch.Tensor, values: torch.Tensor) -> None:
        """Write the chosen elements of a flat tensor of the part; they may be on another device, or of another dtype."""
        values = values.to(flat.device, flat.dtype)
        pieces = values.split(self.sizes) if self.sizes else ()
        for (block, _), columns, piece in zip(
            self._blocks, self._on(flat.device), pieces, strict=True
        ):
            whole = block.of(flat)
            if columns is None:
                whole.copy_(piece.view(block.rows, -1))
            else:
                whole.index_copy_(1, columns, piece.view(block.rows, -1))
