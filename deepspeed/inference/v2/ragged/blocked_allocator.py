# SPDX-License-Identifier: Apache-2.0
"""Which of a fixed number of blocks are free."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from deepspeed.utils.errors import explain


class BlockedAllocator:
    """Gives out blocks by number, in any order.

    Args:
        num_blocks: how many there are, at least one.

    Raises:
        ValueError: fewer.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(
                explain("a cache needs blocks", got=num_blocks, expected="at least one")
            )
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._taken = [False] * num_blocks

    @property
    def free_blocks(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    def allocate(self, num_blocks: int) -> torch.Tensor:
        """Take blocks: an int32 vector of their numbers, on the CPU.

        Raises:
            ValueError: there are not as many; nothing is taken then.
        """
        if not 0 <= num_blocks <= len(self._free):
            raise ValueError(
                explain(
                    "the cache has not as many free blocks",
                    got=num_blocks,
                    expected=f"0 to {len(self._free)}",
                )
            )
        given = [self._free.pop() for _ in range(num_blocks)]
        for block in given:
            self._taken[block] = True
        return torch.tensor(given, dtype=torch.int32, device="cpu")

    def free(self, blocks: Iterable[int] | torch.Tensor | int) -> None:
        """Give blocks back.

        Raises:
            ValueError: one of them is not held, or is named twice; none is given back then.
        """
        numbers = torch.as_tensor(blocks).reshape(-1).tolist()
        held = [b for b in numbers if 0 <= b < self.num_blocks and self._taken[b]]
        if len(held) < len(numbers) or len(set(held)) < len(held):
            raise ValueError(
                explain("blocks can be given back once, by who holds them", got=numbers)
            )
        for block in held:
            self._taken[block] = False
        self._free.extend(reversed(held))
