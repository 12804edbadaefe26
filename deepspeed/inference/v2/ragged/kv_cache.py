# SPDX-License-Identifier: Apache-2.0
"""Keys and values of all sequences, in blocks of as many tokens each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .blocked_allocator import BlockedAllocator
from .sequence_descriptor import DSSequenceDescriptor


@dataclass(frozen=True)
class LayerShape:
    """Keys or values of a token in one layer: heads, and the size of each."""

    heads: int
    head_size: int


class BlockedKVCache:
    """Blocks of tokens; each layer keeps its keys and values at the same places.

    Args:
        shapes: of each layer, of its keys and of its values.
        num_blocks: how many blocks.
        block_size: tokens a block.
        dtype, device: of keys and values.

    Attributes:
        no_slot: a place of zeros, for what is to the left of a shorter sequence: no other sequence's values may stand
            there, as what is masked out of a sum still spoils it if it is not finite.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[LayerShape, LayerShape]],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.device = device
        self.allocator = BlockedAllocator(num_blocks)
        self.no_slot = num_blocks * block_size
        self._layers = [
            tuple(
                torch.empty(
                    self.no_slot + 1, kind.heads, kind.head_size, dtype=dtype, device=device
                )
                for kind in pair
            )
            for pair in shapes
        ]
        for pair in self._layers:
            for home in pair:
                home[self.no_slot] = 0

    @staticmethod
    def bytes_of_block(
        shapes: Sequence[tuple[LayerShape, LayerShape]], block_size: int, dtype: torch.dtype
    ) -> int:
        """Bytes that a block takes in all layers together."""
        numbers = sum(kind.heads * kind.head_size for pair in shapes for kind in pair)
        return numbers * block_size * dtype.itemsize

    def slots(self, sequence: DSSequenceDescriptor, start: int, stop: int) -> torch.Tensor:
        """Where the tokens from `start` to `stop` of a sequence lie: an int64 vector on the CPU."""
        tokens = torch.arange(start, stop, device="cpu")
        blocks = torch.tensor(sequence.blocks, dtype=torch.int64, device="cpu")
        return blocks[tokens // self.block_size] * self.block_size + tokens % self.block_size

    def read(self, slots: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer at [sequences, tokens] slots: [sequences, heads, tokens, head size]."""
        where = slots.to(self.device)
        return [(k[where].transpose(1, 2), v[where].transpose(1, 2)) for k, v in self._layers]

    def write(self, slots: torch.Tensor, made: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keep keys and values of the shapes that `read` gives."""
        where = slots.to(self.device)
        for kept, new in zip(self._layers, made, strict=True):
            for home, value in zip(kept, new, strict=True):
                home[where] = value.transpose(1, 2)
