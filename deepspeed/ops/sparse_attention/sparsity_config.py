# SPDX-License-Identifier: Apache-2.0
"""Which blocks of scores exist: layouts `[heads, rows, columns]` of ones and zeros, in blocks of a sequence."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from deepspeed.utils.errors import explain

_BOTH, _PAST = "bidirectional", "unidirectional"


class SparsityConfig:
    """What all patterns have in common.

    Args:
        num_heads: heads of the attention.
        block: positions of a block.
        different_layout_per_head: make a layout for each head; otherwise all have the first one's.

    Raises:
        ValueError: no heads, or blocks without positions.
    """

    def __init__(
        self, num_heads: int, block: int = 16, different_layout_per_head: bool = False
    ) -> None:
        _at_least_one(num_heads=num_heads, block=block)
        self.num_heads, self.block = num_heads, block
        self.different_layout_per_head = different_layout_per_head
        self.num_layout_heads = num_heads if different_layout_per_head else 1

    def setup_layout(self, seq_len: int) -> Tensor:
        """An empty layout.

        Raises:
            ValueError: the sequence is not made of whole blocks.
        """
        if seq_len % self.block:
            raise ValueError(
                explain(
                    "the sequence does not divide into blocks",
                    got=f"{seq_len} positions, blocks of {self.block}",
                    fix="Pad it: SparseAttentionUtils.pad_to_block_size.",
                )
            )
        blocks = seq_len // self.block
        return torch.zeros((self.num_heads, blocks, blocks), dtype=torch.int64, device="cpu")

    def make_layout(self, seq_len: int) -> Tensor:
        """The layout of a sequence of `seq_len` positions, int64 `[heads, blocks, blocks]`.

        Raises:
            ValueError: the sequence is not made of whole blocks, or too short for the pattern.
        """
        layout = self.setup_layout(seq_len)
        for head in range(self.num_layout_heads):
            self.fill(head, layout[head])
        return self.check_and_propagate_first_head_layout(layout)

    def fill(self, head: int, layout: Tensor) -> None:
        """Set the ones of a head, in its empty `[blocks, blocks]`."""
        raise NotImplementedError(f"{type(self).__name__} is no pattern: use a derived class")

    def check_and_propagate_first_head_layout(self, layout: Tensor) -> Tensor:
        """Give all heads the first one's layout, unless each has its own."""
        if not self.different_layout_per_head:
            layout[1:] = layout[0]
        return layout


class DenseSparsityConfig(SparsityConfig):
    """All blocks; arguments as of `SparsityConfig`, and each head has the same."""

    def __init__(
        self, num_heads: int, block: int = 16, different_layout_per_head: bool = False
    ) -> None:
        super().__init__(num_heads, block)

    def fill(self, head: int, layout: Tensor) -> None:
        """Set all."""
        layout.fill_(1)


class _Directed(SparsityConfig):
    """Patterns that may be kept from the future."""

    def _direct(self, attention: str, horizontal: bool = False) -> None:
        if attention not in (_BOTH, _PAST):
            raise NotImplementedError(
                explain(
                    'only "uni/bi-directional" attentions are supported',
                    got=attention,
                    expected=f"{_PAST} or {_BOTH}",
                )
            )
        if horizontal and attention != _BOTH:
            raise ValueError(
                explain(
                    'only "bi-directional" attentions can support horizontal global attention',
                    got=attention,
                )
            )
        self.attention, self.horizontal_global_attention = attention, horizontal

    def _cut(self, layout: Tensor) -> None:
        """Take away what lies in the future."""
        if self.attention == _PAST:
            layout.tril_()

    def _set_columns(self, layout: Tensor, start: int, end: int) -> None:
        """Have all rows see blocks `[start, end)`, or all rows from there on; horizontally, these see all."""
        layout[0 if self.attention == _BOTH else start :, start:end] = 1
        if self.horizontal_global_attention:
            layout[start:end] = 1

    def _set_window(self, layout: Tensor, start: int, end: int) -> None:
        square = torch.ones_like(layout[start:end, start:end])
        layout[start:end, start:end] |= square.tril_() if self.attention == _PAST else square

    def _set_sliding(self, layout: Tensor, blocks: int) -> None:
        _need("sliding window blocks", blocks, len(layout))
        each = blocks // 2
        window = torch.ones_like(layout).triu(-each).tril(each if self.attention == _BOTH else 0)
        layout[window > 0] = 1

    def _set_random(self, layout: Tensor, blocks: int, anywhere: bool) -> None:
        count = len(layout)
        _need("random blocks", blocks, count)
        for row in range(count):
            columns = count if anywhere else row + 1
            layout[row, random.sample(range(columns), min(blocks, columns))] = 1


class FixedSparsityConfig(_Directed):
    """Windows side by side, each of whose last blocks all others see (arXiv:1904.10509).

    Args:
        num_heads, block, different_layout_per_head: see `SparsityConfig`.
        num_local_blocks: of a window.
        num_global_blocks: of a window, seen from outside.
        attention: "bidirectional" or "unidirectional".
        horizontal_global_attention: these blocks see all others, too.
        num_different_global_patterns: heads take other blocks of a window, as many ways.

    Raises:
        ValueError, NotImplementedError: numbers, or a direction, that do not go together.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_local_blocks: int = 4,
        num_global_blocks: int = 1,
        attention: str = _BOTH,
        horizontal_global_attention: bool = False,
        num_different_global_patterns: int = 1,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        _at_least_one(num_local_blocks=num_local_blocks, num_global_blocks=num_global_blocks)
        if num_local_blocks % num_global_blocks:
            raise ValueError(
                explain(
                    "a window's blocks must be a multiple of its global ones",
                    got=f"{num_local_blocks} and {num_global_blocks}",
                )
            )
        self._direct(attention, horizontal_global_attention)
        most = num_local_blocks // num_global_blocks if different_layout_per_head else 1
        _at_least_one(num_different_global_patterns=num_different_global_patterns)
        if num_different_global_patterns > most:
            raise ValueError(
                explain(
                    "there are not as many different global patterns",
                    got=num_different_global_patterns,
                    expected=f"at most {most}",
                    fix="Set different_layout_per_head, or fewer patterns.",
                )
            )
        self.num_local_blocks, self.num_global_blocks = num_local_blocks, num_global_blocks
        self.num_different_global_patterns = num_different_global_patterns

    def fill(self, head: int, layout: Tensor) -> None:
        """Set windows, then what is seen from everywhere; a shorter last window is treated as if it ended in time."""
        count, local, many = len(layout), self.num_local_blocks, self.num_global_blocks
        for start in range(0, count, local):
            self._set_window(layout, start, min(start + local, count))
        first = local - (1 + head % self.num_different_global_patterns) * many
        whole = count - count % local
        for start in range(first, whole, local):
            self._set_columns(layout, start, start + many)
        if whole < count:
            start = max(0, min(whole + first, count - many))
            self._set_columns(layout, start, start + many)


class VariableSparsityConfig(_Directed):
    """Windows of given sizes, chosen global blocks, and random ones.

    Args:
        num_heads, block, different_layout_per_head: see `SparsityConfig`.
        num_random_blocks: in each row.
        local_window_blocks: of the first windows; further ones are as large as the last.
        global_block_indices: blocks that all see.
        global_block_end_indices: if given, the blocks from each index up to these.
        attention: "bidirectional" or "unidirectional".
        horizontal_global_attention: global blocks see all others, too.

    Raises:
        ValueError, NotImplementedError: numbers, or a direction, that do not go together.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 0,
        local_window_blocks: Sequence[int] = (4,),
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = _BOTH,
        horizontal_global_attention: bool = False,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = num_random_blocks
        self.local_window_blocks = list(local_window_blocks)
        _at_least_one(local_window_blocks=min(self.local_window_blocks, default=0))
        self.global_block_indices = list(global_block_indices)
        self.global_block_end_indices = _checked_ends(
            global_block_indices, global_block_end_indices
        )
        self._direct(attention, horizontal_global_attention)

    def fill(self, head: int, layout: Tensor) -> None:
        """Set random blocks (of the future, too, in either direction), windows and global blocks."""
        count, start = len(layout), 0
        self._set_random(layout, self.num_random_blocks, anywhere=True)
        sizes = iter(self.local_window_blocks)
        size = self.local_window_blocks[-1]
        while start < count:
            end = start + next(sizes, size)
            self._set_window(layout, start, min(end, count))
            start = end
        for first, last in _runs(self.global_block_indices, self.global_block_end_indices, count):
            self._set_columns(layout, first, last)


class BigBirdSparsityConfig(_Directed):
    """A sliding window, random blocks, and first blocks that all see and that see all (arXiv:2007.14062).

    Args:
        num_heads, block, different_layout_per_head: see `SparsityConfig`.
        num_random_blocks: in each row.
        num_sliding_window_blocks: around each row, itself included.
        num_global_blocks: how many first ones.
        attention: "bidirectional" or "unidirectional".

    Raises:
        NotImplementedError: another direction.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 1,
        num_sliding_window_blocks: int = 3,
        num_global_blocks: int = 1,
        attention: str = _BOTH,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = num_random_blocks
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self.num_global_blocks = num_global_blocks
        self._direct(attention)

    def fill(self, head: int, layout: Tensor) -> None:
        """Set random blocks, the window and the first blocks."""
        self._set_random(layout, self.num_random_blocks, anywhere=self.attention == _BOTH)
        self._set_sliding(layout, self.num_sliding_window_blocks)
        _need("global blocks", self.num_global_blocks, len(layout))
        layout[: self.num_global_blocks] = 1
        layout[:, : self.num_global_blocks] = 1
        self._cut(layout)


class BSLongformerSparsityConfig(_Directed):
    """A sliding window, and chosen blocks that all see and that see all (arXiv:2004.05150, in blocks).

    Args:
        num_heads, block, different_layout_per_head: see `SparsityConfig`.
        num_sliding_window_blocks: around each row, itself included.
        global_block_indices, global_block_end_indices: as of `VariableSparsityConfig`.
        attention: "bidirectional" or "unidirectional".

    Raises:
        ValueError, NotImplementedError: numbers, or a direction, that do not go together.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_sliding_window_blocks: int = 3,
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = _BOTH,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self.global_block_indices = list(global_block_indices)
        self.global_block_end_indices = _checked_ends(
            global_block_indices, global_block_end_indices
        )
        self._direct(attention)

    def fill(self, head: int, layout: Tensor) -> None:
        """Set the window and the chosen blocks."""
        self._set_sliding(layout, self.num_sliding_window_blocks)
        runs = _runs(self.global_block_indices, self.global_block_end_indices, len(layout))
        for first, last in runs:
            layout[first:last] = 1
            layout[:, first:last] = 1
        self._cut(layout)


class LocalSlidingWindowSparsityConfig(_Directed):
    """A sliding window alone.

    Args:
        num_heads, block: see `SparsityConfig`.
        num_sliding_window_blocks: around each row, itself included.
        attention: "bidirectional" or "unidirectional".

    Raises:
        NotImplementedError: another direction.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        num_sliding_window_blocks: int = 3,
        attention: str = _PAST,
    ) -> None:
        super().__init__(num_heads, block)
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self._direct(attention)

    def fill(self, head: int, layout: Tensor) -> None:
        """Set the window."""
        self._set_sliding(layout, self.num_sliding_window_blocks)


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(explain(f"{name} is too small", got=number, expected="at least 1"))


def _need(what: str, wanted: int, count: int) -> None:
    if wanted > count:
        raise ValueError(
            explain(
                f"there are more {what} than blocks in a row",
                got=wanted,
                expected=f"at most {count}",
                fix="Use a longer sequence, or smaller blocks.",
            )
        )


def _checked_ends(starts: Sequence[int], ends: Sequence[int] | None) -> list[int] | None:
    if ends is None:
        return None
    if len(ends) != len(starts) or any(e <= s for s, e in zip(starts, ends, strict=False)):
        raise ValueError(
            explain(
                "global_block_end_indices do not go with global_block_indices",
                got=f"{list(starts)} and {list(ends)}",
                expected="as many, each behind its start",
            )
        )
    return list(ends)


def _runs(starts: Sequence[int], ends: Sequence[int] | None, count: int) -> list[tuple[int, int]]:
    """Runs of blocks, as far as there are such blocks."""
    last = [start + 1 for start in starts] if ends is None else ends
    return [(s, min(e, count)) for s, e in zip(starts, last, strict=True) if s < count]
