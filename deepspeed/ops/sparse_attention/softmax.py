# SPDX-License-Identifier: Apache-2.0
"""Softmax over the rows of a matrix that exists in some blocks only."""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = float("-inf")


class Softmax:
    """Softmax of `[batch, blocks, block, block]`; what is in no block counts as minus infinity.

    Args:
        layout: ones and zeros, `[heads, rows, columns]` in blocks.
        block: side of a block.
        bench: unused.
    """

    def __init__(self, layout: Tensor, block: int, bench: bool = False) -> None:
        self.layout, self.block, self.bench = layout, block, bench

    def __call__(
        self,
        x: Tensor,
        scale: float = 1.0,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "add",
    ) -> Tensor:
        """`softmax(x * scale + rpe + masks)`; differentiable. Rows that are all minus infinity become zeros.

        Args:
            x: blocks, in the order of the layout's ones; not changed.
            scale: of the scores.
            rpe: `[batch or 1, heads, rows, columns]`.
            key_padding_mask: `[batch, columns]`.
            attn_mask: `[rows, columns]`.
            key_padding_mask_mode, attn_mask_mode: "add", or "mul" for a mask whose zeros take scores away.
        """
        head, row, column = self.layout.to(x.device).nonzero(as_tuple=True)
        heads, rows, columns = self.layout.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = x.to(wide) * scale
        shape = (rows, self.block), (columns, self.block)
        if rpe is not None:
            tiles = rpe.unflatten(3, shape[1]).unflatten(2, shape[0]).transpose(3, 4)
            scores = scores + tiles[:, head, row, column].to(wide)
        if key_padding_mask is not None:
            tiles = _added(key_padding_mask, key_padding_mask_mode, wide).unflatten(1, shape[1])
            scores = scores + tiles[:, column].unsqueeze(2)
        if attn_mask is not None:
            tiles = _added(attn_mask, attn_mask_mode, wide).unflatten(1, shape[1])
            scores = scores + tiles.unflatten(0, shape[0]).transpose(1, 2)[row, column]
        place = head * rows + row
        top = scores.detach().amax(-1)
        most = top.new_full((len(x), heads * rows, self.block), _NEVER)
        index = place[None, :, None].expand_as(top)
        most = most.scatter_reduce(1, index, top, "amax").clamp_min(torch.finfo(wide).min)
        powers = (scores - most[:, place].unsqueeze(-1)).exp()
        sums = powers.new_zeros(most.shape).index_add(1, place, powers.sum(-1))
        sums = sums.masked_fill(sums == 0, 1.0)
        return (powers / sums[:, place].unsqueeze(-1)).to(x.dtype)


def _added(mask: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    if mode == "add":
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask == 0, _NEVER)
