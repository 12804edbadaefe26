# SPDX-License-Identifier: Apache-2.0
"""Layers of very long sequences, chunk by chunk: attention, MLP and loss (FPDT, arXiv:2408.16978).

[Note: Chunks and ranks]
A sequence is cut into chunks, and each chunk into one piece a rank, so that every rank has a piece of each chunk. An
exchange of one chunk gives the ranks all of its positions, in order, with some heads each. Queries, keys, values and
outputs of all chunks wait in host memory; a pair of them at a time is on the device.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepspeed.utils.errors import explain

from .chunk_attention import SequenceChunk
from .fpdt_attention import Exchange, FPDTAttentionCore
from .fpdt_chunked import FPDT_FFN, FPDT_LogitsLoss

__all__ = [
    "FPDT_Attention",
    "FPDT_FFN",
    "FPDT_InputConstruct",
    "FPDT_LogitsLoss",
    "SequenceChunk",
]

# the name by which the core is tested
_FPDTGPUOffloadingAttentionImpl_ = FPDTAttentionCore


class FPDT_InputConstruct(nn.Module):
    """A rank's part of a batch; see [Note: Chunks and ranks].

    Args:
        tokens: `[batch, sequence, ...]`.
        labels, position_ids: cut like the tokens; None for none.
        loss_mask: `[batch, sequence]`, put into the order in which `FPDT_LogitsLoss` gives losses; None for none.
        attention_mask: handed on as it is.
        args: with `ds_sequence_parallel_fpdt_chunk_size`, positions of a chunk; a shorter sequence is one chunk.
        sp_size, sp_rank: ranks of the sequence, and which one this is.

    Raises:
        AssertionError: the sequence does not divide into chunks, or a chunk over the ranks.
    """

    def __init__(
        self,
        tokens: Tensor,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        args: Any,
        sp_size: int,
        sp_rank: int,
    ) -> None:
        super().__init__()
        self.tokens, self.labels, self.loss_mask = tokens, labels, loss_mask
        self.attention_mask, self.position_ids = attention_mask, position_ids
        self.sp_size, self.sp_rank = sp_size, sp_rank
        self.global_seq_len = tokens.shape[1]
        self.chunk_size = min(args.ds_sequence_parallel_fpdt_chunk_size, self.global_seq_len)
        if self.global_seq_len % self.chunk_size or self.chunk_size % sp_size:
            raise AssertionError(
                explain(
                    "the sequence does not divide into chunks over the ranks",
                    got=f"{self.global_seq_len} positions, chunks of {self.chunk_size}, {sp_size} ranks",
                    expected="whole chunks, and equal pieces of a chunk",
                )
            )

    def generate(self) -> tuple[Tensor | None, ...]:
        """This rank's tokens and labels, the loss mask, the attention mask and this rank's position ids."""
        return (
            self._own(self.tokens),
            self._own(self.labels),
            self._all(self.loss_mask),
            self.attention_mask,
            self._own(self.position_ids),
        )

    def _pieces(self, values: Tensor) -> Tensor:
        """`[batch, chunks, ranks, positions, ...]`."""
        batch, length, *rest = values.shape
        chunks = length // self.chunk_size
        return values.reshape(batch, chunks, self.sp_size, self.chunk_size // self.sp_size, *rest)

    def _own(self, values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return self._pieces(values)[:, :, self.sp_rank].flatten(1, 2).contiguous()

    def _all(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else self._pieces(values).transpose(1, 2).flatten(1, 3)


class FPDT_Attention(nn.Module):
    """Self-attention of Megatron's shape, chunk by chunk.

    Args:
        config: with `hidden_size`, `num_attention_heads`, and if they differ from what follows `kv_channels` (D) and
            `num_key_value_heads`.
        first_weight, first_bias: of the projection to queries, keys and values.
        second_weight, second_bias: of the projection of the output.
        sequence_process_group: the ranks of the sequence.
        gather_idx, scatter_idx: 0 and 2.
        return_bias: give the second bias back instead of adding it.
        chunk_size: positions of a chunk, over all ranks; a shorter sequence is one chunk.
        enable_offloading: chunks wait in host memory.
    """

    def __init__(
        self,
        config: Any,
        first_weight: Tensor,
        first_bias: Tensor | None,
        second_weight: Tensor,
        second_bias: Tensor | None,
        sequence_process_group: Any,
        gather_idx: int = 0,
        scatter_idx: int = 2,
        return_bias: bool = True,
        chunk_size: int = 65536,
        enable_offloading: bool = True,
    ) -> None:
        super().__init__()
        heads = config.num_attention_heads
        self.hidden_size = config.hidden_size
        self.head_size = getattr(config, "kv_channels", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.projection_size, self.kv_projection_size = (
            heads * self.head_size,
            kv_heads * self.head_size,
        )
        self.qkv_linear_weight, self.qkv_linear_bias = first_weight, first_bias
        self.dense_weight, self.dense_bias = second_weight, second_bias
        self.spg = sequence_process_group
        self.gather_idx, self.scatter_idx = gather_idx, scatter_idx
        self.return_bias, self.chunk_size = return_bias, chunk_size
        self.enable_offloading = enable_offloading

    def forward(
        self,
        layernorm_output: Tensor,
        attention_mask: Any,
        inference_params: Any,
        rotary_pos_emb: tuple[Tensor, Tensor] | None,
        cpu_offloading: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments as of the layer's core, which see.

        Returns:
            `[positions of this rank, batch, hidden]`, and the second bias if it is not added.
        """
        length = len(layernorm_output) * Exchange(self.spg).size
        context = FPDTAttentionCore.apply(
            layernorm_output,
            attention_mask,
            inference_params,
            rotary_pos_emb,
            self.spg,
            self.scatter_idx,
            self.gather_idx,
            self.hidden_size,
            self.projection_size,
            self.head_size,
            self.kv_projection_size,
            self.qkv_linear_weight,
            self.qkv_linear_bias,
            0.0,
            max(1, length // self.chunk_size),
            self.enable_offloading and cpu_offloading,
        )
        merged = context.flatten(2).transpose(0, 1)
        bias = None if self.return_bias else self.dense_bias
        output = nn.functional.linear(merged, self.dense_weight, bias)
        return output, self.dense_bias if self.return_bias else None
