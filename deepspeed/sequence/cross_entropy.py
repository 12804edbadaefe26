# SPDX-License-Identifier: Apache-2.0
"""Cross entropy of a sequence that is split over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspeed import comm as dist
from deepspeed.utils.errors import explain

_REDUCTIONS = ("none", "mean", "sum")


class _GatherSequence(torch.autograd.Function):
    """All ranks' losses one behind the other; each rank's gradient is its own part."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, group: Any) -> Tensor:
        ctx.length, ctx.rank = loss.shape[0], dist.get_rank(group)
        ranks = dist.get_world_size(group)
        gathered = loss.new_empty((loss.shape[0] * ranks, *loss.shape[1:]))
        dist.all_gather_into_tensor(gathered, loss.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(0, ctx.rank * ctx.length, ctx.length), None


def vocab_sequence_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    sp_group: Any,
    tp_group: Any = None,
    vocab_start_index: int | None = None,
    vocab_end_index: int | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
    gather_sequence_loss: bool = True,
    backend: str = "torch",
) -> Tensor:
    """Loss of every position, gathered from the ranks that share the sequence.

    Args:
        vocab_parallel_logits: `[sequence / ranks, batch, vocabulary]`, the entire vocabulary on each rank.
        target: `[sequence / ranks, batch]` of class indices.
        sp_group: the ranks that share the sequence.
        tp_group, vocab_start_index, vocab_end_index: for a vocabulary split over ranks, which is refused by name.
        ignore_index: target of positions without loss.
        reduction: "none", or "mean" or "sum" over the gathered losses.
        gather_sequence_loss: False for this rank's positions only.
        backend: "torch".

    Returns:
        fp32 losses `[sequence, batch]`, or their reduction. Gradients are those of this rank's positions, so they
        add up over the ranks.

    Raises:
        NotImplementedError: the vocabulary is split, or another backend is asked for.
        ValueError: an unknown reduction.
    """
    split = tp_group is not None and dist.get_world_size(tp_group) > 1
    if split or backend != "torch":
        raise NotImplementedError(
            explain(
                "cross entropy over a vocabulary that is split over ranks is not there",
                got=f"tp_group={tp_group!r}, backend={backend!r}",
                fix="gather the logits of the vocabulary, and leave tp_group and backend out",
            )
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(explain("unknown reduction", got=repr(reduction), expected=_REDUCTIONS))
    flat = vocab_parallel_logits.float().flatten(0, -2)
    loss = torch.nn.functional.cross_entropy(
        flat, target.flatten(), ignore_index=ignore_index, reduction="none"
    ).view(target.shape)
    if gather_sequence_loss:
        loss = _GatherSequence.apply(loss, sp_group)
    if reduction != "mean":
        return loss if reduction == "none" else loss.sum()
    counted = target.ne(ignore_index).to(loss.dtype)
    if gather_sequence_loss:
        counted = _GatherSequence.apply(counted, sp_group)
    return loss.sum() / counted.sum().clamp(min=1)
