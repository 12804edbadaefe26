# SPDX-License-Identifier: Apache-2.0
"""Self-attention over the blocks of a layout.

[Note: Rows with the same columns]
Block rows that see the same columns are computed together, by dense products of just these rows and columns, so that what
a layout leaves out is neither computed nor stored. Patterns have few kinds of rows: windows, and rows that see all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepspeed import comm as dist
from deepspeed.utils.errors import explain

from .sparsity_config import SparsityConfig

_MODES = ("add", "mul")


class Group(NamedTuple):
    """Rows with the same columns; see the note above."""

    head: int | None
    """The head; None for all of them."""
    rows: Tensor
    """Positions of queries."""
    columns: Tensor
    """Positions of keys."""


class Masks(NamedTuple):
    """What is added to scores: each broadcasts to `[batch, heads, rows, columns]`, or is None."""

    relative: Tensor | None
    keys: Tensor | None
    pairs: Tensor | None

    def of(self, group: Group) -> list[Tensor]:
        """The parts that a group has."""
        found = []
        for mask in self:
            if mask is None:
                continue
            if group.head is not None and mask.shape[1] > 1:
                mask = mask[:, group.head : group.head + 1]
            if mask.shape[2] > 1:
                mask = mask.index_select(2, group.rows.to(mask.device))
            if mask.shape[3] > 1:
                mask = mask.index_select(3, group.columns.to(mask.device))
            found.append(mask)
        return found


class SparseSelfAttention(nn.Module):
    """`softmax(query @ key.T / sqrt(D) + masks) @ value` over the blocks of a pattern.

    Args:
        sparsity_config: the pattern.
        key_padding_mask_mode: "add" for a mask that is added, "mul" for one whose zeros take keys away.
        attn_mask_mode: the same for the other mask.
        max_seq_length: the longest sequence; the layouts of shorter ones are parts of its own, which is a buffer.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        sparsity_config: SparsityConfig | None = None,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "mul",
        max_seq_length: int = 2048,
    ) -> None:
        super().__init__()
        if sparsity_config is None:
            from .sparsity_config import FixedSparsityConfig

            sparsity_config = FixedSparsityConfig(num_heads=4)
        self.sparsity_config = sparsity_config
        self.key_padding_mask_mode = _checked(key_padding_mask_mode)
        self.attn_mask_mode = _checked(attn_mask_mode)
        self.max_seq_length = max_seq_length
        self.register_buffer("master_layout", sparsity_config.make_layout(max_seq_length))
        self._need_to_synchronize = True
        self._groups: dict[int, list[Group]] = {}

    def get_layout(self, L: int) -> Tensor:
        """The layout of a sequence of `L` positions.

        Raises:
            ValueError: it is not made of whole blocks, or too long.
        """
        if L % self.sparsity_config.block or self.max_seq_length < L:
            raise ValueError(
                explain(
                    "there is no layout of this sequence",
                    got=f"{L} positions",
                    expected=f"a multiple of {self.sparsity_config.block}, at most max_seq_length={self.max_seq_length}",
                )
            )
        if self._need_to_synchronize:  # random blocks must be the same everywhere
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.broadcast(self.master_layout, src=0)
            self._need_to_synchronize = False
        blocks = L // self.sparsity_config.block
        return self.master_layout[:, :blocks, :blocks]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query, value: `[batch, heads, L, D]`.
            key: like `query`, or `[batch, heads, D, L]`.
            rpe: added to the scores, of a shape that broadcasts to `[batch, heads, L, L]`.
            key_padding_mask: `[batch, L]`, or with ones between.
            attn_mask: `[L, L]`, or with ones before.

        Returns:
            `[batch, heads, L, D]`; zeros for queries that see nothing.

        Raises:
            ValueError: shapes that do not fit, or no layout.
        """
        batch, heads, length, _ = query.shape
        if key.shape != query.shape:
            key = key.transpose(-1, -2)
        if key.shape != query.shape or value.shape[:3] != query.shape[:3]:
            raise ValueError(
                explain(
                    "query, key and value do not fit together",
                    got=f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}",
                )
            )
        if heads != self.sparsity_config.num_heads:
            raise ValueError(
                explain(
                    "another number of heads than the pattern's",
                    got=heads,
                    expected=self.sparsity_config.num_heads,
                )
            )
        pairs = None if attn_mask is None else attn_mask.reshape(1, 1, length, length)
        padding = (
            None if key_padding_mask is None else key_padding_mask.reshape(batch, 1, 1, length)
        )
        masks = Masks(
            None if rpe is None else rpe.reshape(*[1] * (4 - rpe.dim()), *rpe.shape),
            _added(padding, self.key_padding_mask_mode),
            _added(pairs, self.attn_mask_mode),
        )
        return attend(query, key, value, self._groups_of(length), masks)

    def _groups_of(self, length: int) -> list[Group]:
        layout = self.get_layout(length)
        if length not in self._groups:
            self._groups[length] = groups_of(layout, self.sparsity_config.block)
        return self._groups[length]

    def _apply(self, *args: object, **kwargs: object) -> SparseSelfAttention:
        self._groups.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[arg-type]

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._groups.clear()


def groups_of(layout: Tensor, block: int) -> list[Group]:
    """The groups of a layout `[heads, rows, columns]`; see [Note: Rows with the same columns]."""
    table = layout.cpu().bool()
    same = bool((table == table[:1]).all())
    within = torch.arange(block, device="cpu")
    found = []
    for head in range(1 if same else len(table)):
        kinds, which = torch.unique(table[head], dim=0, return_inverse=True)
        for number, columns in enumerate(kinds):
            blocks = ((which == number).nonzero(), columns.nonzero())
            rows, keys = ((at * block + within).flatten().to(layout.device) for at in blocks)
            found.append(Group(None if same else head, rows, keys))
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, groups: list[Group], masks: Masks) -> Tensor:
    """Attention of `[batch, heads, L, D]` by groups."""
    parts: dict[int | None, list[tuple[Tensor, Tensor]]] = {}
    for group in groups:
        of = slice(None) if group.head is None else slice(group.head, group.head + 1)
        out = _attend_group(q[:, of], k[:, of], v[:, of], group, masks)
        parts.setdefault(group.head, []).append((group.rows, out))
    heads = []
    for found in parts.values():
        order = torch.cat([rows for rows, _ in found]).argsort()
        heads.append(torch.cat([out for _, out in found], 2).index_select(2, order))
    return torch.cat(heads, 1)


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: Group, masks: Masks) -> Tensor:
    some_q = q.index_select(2, group.rows)
    if not len(group.columns):
        return torch.zeros_like(some_q[..., :1]).expand(*some_q.shape[:3], v.shape[-1])
    some_k, some_v = (t.index_select(2, group.columns) for t in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (some_q @ some_k.transpose(-1, -2)).to(wide) * q.shape[-1] ** -0.5
    added = masks.of(group)
    for mask in added:
        scores = scores + mask.to(wide)
    if added:
        seen = (scores > float("-inf")).any(-1, keepdim=True)
        weights = scores.masked_fill(~seen, 0.0).softmax(-1) * seen
    else:
        weights = scores.softmax(-1)
    return weights.to(v.dtype) @ some_v


def _added(mask: Tensor | None, mode: str) -> Tensor | None:
    if mask is None or mode == "add":
        return mask
    kept = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return kept.masked_fill_(mask == 0, float("-inf"))


def _checked(mode: str) -> str:
    if mode not in _MODES:
        raise ValueError(explain("unknown mode of a mask", got=mode, expected=f"one of {_MODES}"))
    return mode
