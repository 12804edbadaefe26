# SPDX-License-Identifier: Apache-2.0
"""The all-to-all of Ulysses: a rank's share of the sequence with all heads becomes all of the sequence with its heads.

Ulysses (arXiv:2309.14509) splits a sequence over ranks everywhere but inside attention, where the heads are split. Two
exchanges an attention layer are all that it costs, and attention itself stays anybody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed import comm as dist
from deepspeed.utils.errors import explain


def shares(total: int, parts: int) -> list[int]:
    """Cut `total` into `parts` that differ by at most one, the larger ones first."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def head_shares(heads: int, ranks: int, kv_heads: int | None = None) -> list[int]:
    """How many of `heads` each rank gets, such that query heads stay with their key-value heads.

    Args:
        heads: heads of the tensor, a multiple of `kv_heads`.
        ranks: ranks that share them.
        kv_heads: key-value heads; None where each head has its own.

    Raises:
        ValueError: there are fewer heads than ranks, or `heads` is no multiple of `kv_heads`.
    """
    kv_heads = kv_heads or heads
    if kv_heads < ranks or heads % kv_heads:
        raise ValueError(
            explain(
                "attention heads cannot be shared by the ranks of a sequence",
                got=f"{heads} heads over {kv_heads} key-value heads on {ranks} ranks",
                expected="at least one key-value head a rank, and whole groups of query heads",
                fix="choose a smaller sequence-parallel size",
            )
        )
    return [share * (heads // kv_heads) for share in shares(kv_heads, ranks)]


def lengths_of(values: Tensor, dim: int, group: Any) -> list[int]:
    """What each rank has along `dim`; a collective of them."""
    own = torch.tensor([values.shape[dim]], device=values.device)
    lengths = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, own, group=group)
    return [int(length) for length in lengths]


def exchange(
    values: Tensor,
    scatter_idx: int,
    gather_idx: int,
    scatter_sizes: Sequence[int],
    gather_sizes: Sequence[int],
    group: Any,
) -> Tensor:
    """Split `values` along one dimension over the ranks and join what they send along another; differentiable.

    Args:
        values: any float tensor; along `scatter_idx` it has `sum(scatter_sizes)`, along `gather_idx` this rank's
            entry of `gather_sizes` elements.
        scatter_idx, gather_idx: the two dimensions.
        scatter_sizes: what each rank gets of the first.
        gather_sizes: what each rank has of the second.
        group: the ranks; None is all of them.
    """
    return _Exchange.apply(
        values, scatter_idx, gather_idx, tuple(scatter_sizes), tuple(gather_sizes), group
    )


class _Exchange(torch.autograd.Function):
    """The exchange; its gradient is the exchange back."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        scatter_idx: int,
        gather_idx: int,
        scatter_sizes: tuple[int, ...],
        gather_sizes: tuple[int, ...],
        group: Any,
    ) -> Tensor:
        ctx.way = (scatter_idx, gather_idx, scatter_sizes, gather_sizes, group)
        return _exchange(values, *ctx.way)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scatter_idx, gather_idx, scatter_sizes, gather_sizes, group = ctx.way
        back = _exchange(grads[0], gather_idx, scatter_idx, gather_sizes, scatter_sizes, group)
        return back, None, None, None, None, None


def _exchange(
    values: Tensor,
    scatter_idx: int,
    gather_idx: int,
    scatter_sizes: Sequence[int],
    gather_sizes: Sequence[int],
    group: Any,
) -> Tensor:
    rank = dist.get_rank(group)
    sent = [piece.reshape(-1) for piece in values.split(list(scatter_sizes), scatter_idx)]
    shapes = []
    for size in gather_sizes:
        shape = list(values.shape)
        shape[scatter_idx], shape[gather_idx] = scatter_sizes[rank], size
        shapes.append(torch.Size(shape))
    numels = [shape.numel() for shape in shapes]
    received = values.new_empty(sum(numels))
    dist.all_to_all_single(
        received, torch.cat(sent), numels, [piece.numel() for piece in sent], group=group
    )
    pieces = [
        piece.view(shape) for piece, shape in zip(received.split(numels), shapes, strict=True)
    ]
    return torch.cat(pieces, gather_idx)


def single_all_to_all(
    input: Tensor,
    scatter_idx: int,
    gather_idx: int,
    batch_dim_idx: int,
    group: Any,
    async_op: bool = False,
    handle: Any = None,
    type: Any = None,
    num_kv_heads: int | None = None,
) -> Tensor:
    """Scatter one dimension over the ranks and gather another.

    Args:
        input: `[sequence, batch, heads, ...]` or `[batch, sequence, heads, ...]`; all ranks hold equal shares.
        scatter_idx: 2 to split the heads, or the sequence's dimension to split the sequence.
        gather_idx: the other of the two.
        batch_dim_idx: 0 or 1, where the batch is; nothing depends on it.
        group: the ranks.
        async_op, handle, type: for overlap on the caller's streams, which is refused by name.
        num_kv_heads: key-value heads of the whole model, which stay with theirs where heads do not split evenly.

    Raises:
        NotImplementedError: for `async_op`.
        ValueError: the dimension does not split over the ranks.
    """
    if async_op:
        raise NotImplementedError(
            explain(
                "single_all_to_all(async_op=True) is not there",
                fix="leave async_op out; the exchange is a small part of attention",
            )
        )
    ranks = dist.get_world_size(group)
    total, own = input.shape[scatter_idx], input.shape[gather_idx]
    if scatter_idx > gather_idx:  # the heads are split
        parts = head_shares(total, ranks, num_kv_heads if total % ranks else None)
        return exchange(input, scatter_idx, gather_idx, parts, [own] * ranks, group)
    if total % ranks:
        raise ValueError(
            explain(
                "a sequence does not split over its ranks",
                got=f"{total} positions on {ranks} ranks",
                expected="a multiple",
                fix="pad the sequence",
            )
        )
    gathered = lengths_of(input, gather_idx, group)  # heads may not have split evenly
    return exchange(input, scatter_idx, gather_idx, [total // ranks] * ranks, gathered, group)


class _SeqAllToAll:
    """`single_all_to_all` under the name, and with the order of arguments, that callers of `apply` know."""

    @staticmethod
    def apply(
        group: Any,
        input: Tensor,
        scatter_idx: int,
        gather_idx: int,
        batch_dim_idx: int,
        stream: Any = None,
        handle: Any = None,
        type: Any = None,
        is_fwd: bool = True,
        num_kv_heads: int | None = None,
    ) -> Tensor:
        """See `single_all_to_all`; `stream`, `handle`, `type` and `is_fwd` change nothing."""
        return single_all_to_all(
            input, scatter_idx, gather_idx, batch_dim_idx, group, num_kv_heads=num_kv_heads
        )


class DistributedAttention(torch.nn.Module):
    """Any attention, over a sequence that is split over ranks.

    Args:
        local_attention: called with query, key and value of the whole sequence and this rank's heads, and with what
            else `forward` is given; returns `[sequence, batch, heads, ...]` as its inputs are.
        sequence_process_group: the ranks that share a sequence.
        scatter_idx: the heads' dimension.
        gather_idx: the sequence's dimension.
        sp_stream: a stream to overlap exchanges on; they run on the current one, whatever is given.
        num_kv_heads: key-value heads, where key and value have fewer heads than the query.
    """

    def __init__(
        self,
        local_attention: torch.nn.Module,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.local_attn, self.spg = local_attention, sequence_process_group
        self.scatter_idx, self.gather_idx = scatter_idx, gather_idx
        self.sp_stream, self.num_kv_heads = sp_stream, num_kv_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query, key, value: this rank's share of the sequence, `[sequence / ranks, batch, heads, head size]` or
                with batch and sequence swapped.
            batch_dim_idx: where the batch is, 0 or 1.
            rotary_pos_emb: cosines and sines `[sequence, 1, 1, rotated size]` to turn query and key by, once whole.
            *args, **kwargs: passed to `local_attention`.

        Returns:
            This rank's share of what `local_attention` gives, all heads.
        """
        ranks = dist.get_world_size(self.spg)
        heads, kv_heads = query.shape[self.scatter_idx], key.shape[self.scatter_idx]
        positions = query.shape[self.gather_idx]
        query_parts = head_shares(heads, ranks, kv_heads)
        kv_parts = head_shares(kv_heads, ranks)
        sequence = [positions] * ranks

        def whole(values: Tensor, parts: list[int]) -> Tensor:
            return exchange(values, self.scatter_idx, self.gather_idx, parts, sequence, self.spg)

        query, key, value = (
            whole(query, query_parts),
            whole(key, kv_parts),
            whole(value, kv_parts),
        )
        if rotary_pos_emb is not None:
            cos, sin = rotary_pos_emb
            if batch_dim_idx == 0:
                cos, sin = cos.permute(1, 0, 2, 3), sin.permute(1, 0, 2, 3)
            query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)
        context = self.local_attn(query, key, value, *args, **kwargs)
        width = context.shape[self.scatter_idx]
        rank = dist.get_rank(self.spg)
        # Attention may have joined heads and head size into one dimension.
        widths = [part * width // query_parts[rank] for part in query_parts]
        return exchange(context, self.gather_idx, self.scatter_idx, sequence, widths, self.spg)


def apply_rotary_pos_emb(t: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
    """Turn the first `freqs_cos.shape[-1]` features of `t` by the given angles (arXiv:2104.09864)."""
    size = freqs_cos.shape[-1]
    turned, rest = t[..., :size], t[..., size:]
    turned = turned * freqs_cos.to(t.dtype) + _rotate_half(turned) * freqs_sin.to(t.dtype)
    return torch.cat((turned, rest), -1)


def _rotate_half(t: Tensor) -> Tensor:
    """The features of `t` turned by a quarter: (x, y) becomes (-y, x), where x and y are its halves."""
    x, y = t.chunk(2, dim=-1)
    return torch.cat((-y, x), dim=-1)


# Programs ask whether a fused kernel of another package turns them.
_torchembed_available = False
