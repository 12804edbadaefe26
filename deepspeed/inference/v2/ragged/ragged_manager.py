# SPDX-License-Identifier: Apache-2.0
"""The sequences that an engine knows, and the cache they share."""

from __future__ import annotations

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from ..config_v2 import DSStateManagerConfig
from .kv_cache import BlockedKVCache
from .sequence_descriptor import DSSequenceDescriptor


class DSStateManager:
    """Finds, begins and ends sequences.

    Args:
        config: limits.
        cache: where keys and values are kept.
    """

    def __init__(self, config: DSStateManagerConfig, cache: BlockedKVCache) -> None:
        self.config = config
        self.cache = cache
        self._sequences: dict[int, DSSequenceDescriptor] = {}

    @property
    def n_tracked_sequences(self) -> int:
        """How many sequences there are."""
        return len(self._sequences)

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self.cache.allocator.free_blocks

    def get_sequence(self, uid: int) -> DSSequenceDescriptor | None:
        """The sequence of that uid; None if there is none."""
        return self._sequences.get(uid)

    def get_or_create_sequence(self, uid: int) -> DSSequenceDescriptor:
        """The sequence of that uid, begun where there is none.

        Raises:
            RuntimeError: too many are tracked.
        """
        if uid not in self._sequences:
            if len(self._sequences) >= self.config.max_tracked_sequences:
                raise RuntimeError(
                    explain(
                        "too many sequences are tracked",
                        expected=f"at most {self.config.max_tracked_sequences}",
                        fix="flush() those that are done, or raise state_manager.max_tracked_sequences.",
                    )
                )
            self._sequences[uid] = DSSequenceDescriptor(uid)
        return self._sequences[uid]

    def allocate_blocks(self, sequence: DSSequenceDescriptor, tokens: int) -> int:
        """Give a sequence the blocks that `tokens` more tokens need; returns how many.

        Raises:
            ValueError: there are not as many free.
        """
        more = sequence.blocks_for(tokens, self.cache.block_size)
        sequence.blocks += self.cache.allocator.allocate(more).tolist()
        return more

    def take_back(self, sequence: DSSequenceDescriptor, blocks: int) -> None:
        """Free a sequence's last blocks; one that holds nothing is forgotten."""
        if blocks:
            self.cache.allocator.free(sequence.blocks[-blocks:])
            del sequence.blocks[-blocks:]
        if not sequence.seen_tokens and not sequence.blocks:
            self._sequences.pop(sequence.uid, None)

    def flush_sequence(self, uid: int) -> None:
        """Forget a sequence and free its blocks; one that is unknown is warned of."""
        sequence = self._sequences.pop(uid, None)
        if sequence is None:
            logger.warning(f"flush: there is no sequence {uid}")
            return
        self.cache.allocator.free(sequence.blocks)
