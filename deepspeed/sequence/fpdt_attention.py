# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention over a sequence whose chunks wait in host memory; see [Note: Chunks and ranks]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepspeed import comm as dist
from deepspeed.utils.errors import explain

from .chunk_attention import SequenceChunk, attend, attend_backward, join
from .layer import single_all_to_all


class Exchange:
    """Heads for positions, over the ranks of a sequence."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group) if dist.is_initialized() else 1

    def to_heads(self, values: Tensor) -> Tensor:
        """`[positions of this rank, batch, heads, D]` to `[all, batch, heads of this rank, D]`."""
        return values if self.size == 1 else single_all_to_all(values, 2, 0, 1, self.group)

    def to_positions(self, values: Tensor) -> Tensor:
        """The way back."""
        return values if self.size == 1 else single_all_to_all(values, 0, 2, 1, self.group)


class _Keeper:
    """Chunks that wait: in host memory, or where they are."""

    def __init__(self, offload: bool) -> None:
        self._offload = offload

    def keep(self, values: Tensor) -> SequenceChunk:
        return SequenceChunk(values, is_in_use=not self._offload)


def _grouped(values: Tensor, kv_heads: int) -> Tensor:
    """`[positions, batch, heads, D]` as `[batch, kv heads, heads of each, positions, D]`."""
    positions, batch, heads, width = values.shape
    return values.view(positions, batch, kv_heads, heads // kv_heads, width).permute(1, 2, 3, 0, 4)


def _ungrouped(values: Tensor) -> Tensor:
    return values.permute(3, 0, 1, 2, 4).flatten(2, 3)


def _rotate(values: Tensor, angles: tuple[Tensor, Tensor], back: bool = False) -> Tensor:
    """Turn the first components of `[positions, batch, heads, D]` by `angles`, cosines and sines of as many positions."""
    cos, sin = (part.reshape(len(values), 1, 1, -1).to(values.dtype) for part in angles)
    width = cos.shape[-1]
    turned, rest = values[..., :width], values[..., width:]
    if back:  # the transpose of the turn
        first, second = (turned * sin).chunk(2, -1)
        halves = torch.cat((second, -first), -1)
    else:
        first, second = turned.chunk(2, -1)
        halves = torch.cat((-second, first), -1) * sin
    return torch.cat((turned * cos + halves, rest), -1)


class FPDTAttentionCore(torch.autograd.Function):
    """Projection to queries, keys and values, exchange and causal attention, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        layernorm_output: Tensor,
        attention_mask: Any,
        inference_params: Any,
        rotary_pos_emb: tuple[Tensor, Tensor] | None,
        spg: Any,
        scatter_idx: int,
        gather_idx: int,
        hidden_size: int,
        projection_size: int,
        hidden_size_per_attention_head: int,
        kv_projection_size: int,
        qkv_linear_weight: Tensor,
        qkv_linear_bias: Tensor | None,
        dropout: float,
        num_chunks: int = 8,
        cpu_offloading: bool = True,
    ) -> Tensor:
        """Attend.

        Args:
            layernorm_output: `[positions of this rank, batch, hidden]`, in the order of `FPDT_InputConstruct`.
            attention_mask: ignored: attention is causal.
            inference_params: must be None.
            rotary_pos_emb: cosines and sines of all positions, `[sequence, 1, 1, D]`; None for no turns.
            spg: the ranks of the sequence.
            scatter_idx, gather_idx: 2 and 0.
            hidden_size, projection_size, kv_projection_size: of the input, of all queries, of all keys.
            hidden_size_per_attention_head: D.
            qkv_linear_weight, qkv_linear_bias: all queries, then all keys, then all values.
            dropout: must be 0.
            num_chunks: of the sequence.
            cpu_offloading: chunks wait in host memory.

        Returns:
            `[batch, positions of this rank, heads, D]`.
        """
        _check(layernorm_output, inference_params, (scatter_idx, gather_idx), dropout, num_chunks)
        head = hidden_size_per_attention_head
        sizes = [projection_size, kv_projection_size, kv_projection_size]
        exchange, keeper, scale = Exchange(spg), _Keeper(cpu_offloading), head**-0.5
        ranks = exchange.size
        kv_heads = kv_projection_size // head // ranks
        kept: list[list[SequenceChunk]] = []
        outputs = []
        for number, piece in enumerate(layernorm_output.chunk(num_chunks)):
            joint = nn.functional.linear(piece, qkv_linear_weight, qkv_linear_bias)
            parts = [
                exchange.to_heads(part.unflatten(-1, (-1, head)).contiguous())
                for part in joint.split(sizes, -1)
            ]
            angles = _angles_of(rotary_pos_emb, number, len(parts[0]))
            if angles is not None:
                parts[:2] = [_rotate(part, angles) for part in parts[:2]]
            q, k, v = (_grouped(part, kv_heads) for part in parts)
            out, sums = attend(q, k, v, scale, causal=True)
            for earlier in kept:
                pair = (earlier[1].values(), earlier[2].values())
                out, sums = join(out, sums, *attend(q, *pair, scale, causal=False))
            out = _ungrouped(out.to(q.dtype))
            kept.append([keeper.keep(values) for values in (q, k, v, out, sums)])
            outputs.append(exchange.to_positions(out.contiguous()).transpose(0, 1))
        ctx.kept, ctx.exchange, ctx.keeper = kept, exchange, keeper
        ctx.rotary, ctx.scale, ctx.kv_heads = rotary_pos_emb, scale, kv_heads
        ctx.save_for_backward(layernorm_output, qkv_linear_weight, qkv_linear_bias)
        return torch.cat(outputs, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """Gradients of the input, the weight and the bias; chunks of keys outside, those of queries inside."""
        inputs, weight, bias = ctx.saved_tensors
        kept, keeper, kv_heads = ctx.kept, ctx.keeper, ctx.kv_heads
        grads: list[SequenceChunk] = []
        products: list[Tensor] = []
        for (_, _, _, out, _), grad in zip(kept, grad_output.chunk(len(kept), 1), strict=True):
            own = ctx.exchange.to_heads(grad.transpose(0, 1).contiguous())
            wide = torch.promote_types(own.dtype, torch.float32)
            product = (own.to(wide) * out.values().to(wide)).sum(-1, keepdim=True)
            products.append(_grouped(product, kv_heads).squeeze(-1))
            grads.append(keeper.keep(_grouped(own, kv_heads)))
        to_input = torch.empty_like(inputs)
        wide = torch.promote_types(weight.dtype, torch.float32)
        to_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        to_queries: list[SequenceChunk | None] = [None] * len(kept)
        pieces = zip(inputs.chunk(len(kept)), to_input.chunk(len(kept)), strict=True)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for number, (piece, target) in enumerate(pieces):
            k, v = (kept[number][index].values() for index in (1, 2))
            to_k, to_v = (torch.zeros_like(t, dtype=wide) for t in (k, v))
            for later in range(number, len(kept)):
                q, sums = (kept[later][index].values() for index in (0, 4))
                pair = (grads[later].values(), (q, k, v), sums, products[later])
                more = attend_backward(*pair, ctx.scale, causal=later == number)
                to_k, to_v = to_k.add_(more[1]), to_v.add_(more[2])
                before = to_queries[later]
                so_far = more[0] if before is None else more[0].add_(before.values())
                to_queries[later] = keeper.keep(so_far)
            done = to_queries[number]  # no later keys are seen
            assert done is not None
            joint = _joint_gradient(ctx, number, (done.values(), to_k, to_v), piece.dtype)
            to_queries[number] = None
            target.copy_(joint @ weight)
            flat = joint.flatten(0, 1).to(wide)
            to_weight.addmm_(flat.t(), piece.flatten(0, 1).to(wide))
            if to_bias is not None:
                to_bias.add_(flat.sum(0))
        grad_bias = None if to_bias is None else to_bias.to(bias.dtype)
        return to_input, *[None] * 10, to_weight.to(weight.dtype), grad_bias, None, None, None


def _joint_gradient(
    ctx: Any, number: int, grads: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """The gradient of a chunk's queries, keys and values as the projection gave them, on this rank's positions."""
    parts = [_ungrouped(grad).to(dtype) for grad in grads]
    angles = _angles_of(ctx.rotary, number, len(parts[0]))
    if angles is not None:
        parts[:2] = [_rotate(part, angles, back=True) for part in parts[:2]]
    return torch.cat(
        [ctx.exchange.to_positions(part.contiguous()).flatten(2) for part in parts], -1
    )


def _angles_of(
    rotary: tuple[Tensor, Tensor] | None, number: int, length: int
) -> tuple[Tensor, Tensor] | None:
    if rotary is None:
        return None
    cos, sin = (part.narrow(0, number * length, length) for part in rotary)
    return cos, sin


def _check(
    inputs: Tensor, inference: Any, ways: tuple[int, int], dropout: float, chunks: int
) -> None:
    if inference is not None or dropout or ways != (2, 0):
        raise NotImplementedError(
            explain(
                "FPDT attention is for training, without dropout, with the sequence first",
                got=f"inference_params {inference is not None}, dropout {dropout}, "
                f"scatter_idx and gather_idx {ways}",
                expected="None, 0, and (2, 0)",
            )
        )
    if chunks < 1 or len(inputs) % chunks:
        raise ValueError(
            explain(
                "positions do not divide into chunks",
                got=f"{len(inputs)} positions of this rank, {chunks} chunks",
            )
        )
