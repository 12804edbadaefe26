# SPDX-License-Identifier: Apache-2.0
"""What is known of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DSSequenceDescriptor:
    """A sequence whose keys and values are in the cache.

    Attributes:
        uid: the caller's name for it.
        seen_tokens: tokens that are in the cache.
        blocks: those that hold them, in order.
    """

    uid: int
    seen_tokens: int = 0
    blocks: list[int] = field(default_factory=list)

    def blocks_for(self, tokens: int, block_size: int) -> int:
        """How many more blocks `tokens` more tokens need."""
        return max(0, -(-(self.seen_tokens + tokens) // block_size) - len(self.blocks))
