# SPDX-License-Identifier: Apache-2.0
"""BERT's self-attention over the blocks of a pattern."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepspeed.utils.errors import explain

from .sparse_self_attention import SparseSelfAttention
from .sparsity_config import FixedSparsityConfig, SparsityConfig


class BertSparseSelfAttention(nn.Module):
    """Projections to queries, keys and values, and sparse attention.

    Args:
        config: with `hidden_size` and `num_attention_heads`, and perhaps `max_position_embeddings`.
        sparsity_config: the pattern; None for `FixedSparsityConfig`.

    Raises:
        ValueError: the hidden size is no multiple of the heads.
    """

    def __init__(self, config: Any, sparsity_config: SparsityConfig | None = None) -> None:
        super().__init__()
        heads = config.num_attention_heads
        if config.hidden_size % heads:
            raise ValueError(
                explain(
                    "the hidden size is no multiple of the number of heads",
                    got=f"{config.hidden_size} and {heads}",
                )
            )
        self.num_attention_heads = heads
        self.attention_head_size = config.hidden_size // heads
        self.all_head_size = config.hidden_size
        self.query, self.key, self.value = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3)
        )
        sparsity_config = sparsity_config or FixedSparsityConfig(num_heads=heads)
        block = sparsity_config.block
        longest = max(2048, getattr(config, "max_position_embeddings", 0)) // block * block
        self.sparse_self_attention = SparseSelfAttention(sparsity_config, max_seq_length=longest)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        """`[batch, L, hidden]` to `[batch, heads, L, D]`."""
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            hidden_states: `[batch, L, hidden]`.
            attention_mask: added to the scores, `[batch, 1, 1, L]` or `[batch, L]`; None for none.

        Returns:
            `[batch, L, hidden]`.
        """
        query, key, value = (
            self.transpose_for_scores(project(hidden_states))
            for project in (self.query, self.key, self.value)
        )
        context = self.sparse_self_attention(query, key, value, key_padding_mask=attention_mask)
        return context.transpose(1, 2).flatten(2)
