# SPDX-License-Identifier: Apache-2.0
"""An MLP and a loss that take some positions of a sequence at a time, and compute them again for the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepspeed import comm as dist


class FPDT_FFN(torch.autograd.Function):
    """An MLP with GELU (by tanh), some positions at a time; what is between its layers is computed again for gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        add_bias: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply it.

        Args:
            x: `[positions, batch, hidden]`.
            w1, b1, w2, b2: of the two layers.
            add_bias: add the second bias instead of giving it back.
            chunk_size: positions at a time.

        Returns:
            Of `x`'s shape, and the second bias if it is not added.
        """
        ctx.add_bias, ctx.chunk_size = add_bias, chunk_size
        ctx.save_for_backward(x, w1, b1, w2, b2)
        added = b2 if add_bias else None
        pieces = [_mlp(piece, w1, b1, w2, added) for piece in x.split(chunk_size)]
        return torch.cat(pieces), None if add_bias or b2 is None else b2.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, grad_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of both layers."""
        x, w1, b1, w2, b2 = ctx.saved_tensors
        weights = (w1, b1, w2, b2 if ctx.add_bias else None)
        to_x, (of_w1, of_b1, of_w2, of_b2) = _chunked_gradients(
            _mlp, x.split(ctx.chunk_size), weights, grad_output.split(ctx.chunk_size)
        )
        return to_x, of_w1, of_b1, of_w2, of_b2 if ctx.add_bias else grad_bias, None, None


def _mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    middle = nn.functional.gelu(nn.functional.linear(x, w1, b1), approximate="tanh")
    return nn.functional.linear(middle, w2, b2)


class FPDT_LogitsLoss(torch.autograd.Function):
    """Cross-entropy of a language model, whose logits exist for some positions at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        lm_output: Tensor,
        labels: Tensor,
        logit_weights: Tensor,
        rank: int,
        spg_size: int,
        spg: Any,
        num_chunk: int,
    ) -> Tensor:
        """Compute it.

        Args:
            lm_output: `[positions of this rank, batch, hidden]`.
            labels: `[batch, positions of this rank]`.
            logit_weights: `[words, hidden]`.
            rank, spg_size, spg: of the ranks of the sequence.
            num_chunk: parts that the positions are taken in.

        Returns:
            Losses in fp32, `[positions of all ranks, batch]`, rank after rank. Gradients flow to this rank's share.
        """
        pieces, wanted = lm_output.chunk(num_chunk), labels.t().chunk(num_chunk)
        ctx.num_chunk, ctx.rank = num_chunk, rank
        ctx.save_for_backward(lm_output, labels, logit_weights)
        losses = torch.cat(
            [_loss(piece, logit_weights, want) for piece, want in zip(pieces, wanted, strict=True)]
        )
        if spg_size == 1:
            return losses
        whole = losses.new_empty(spg_size * len(losses), *losses.shape[1:])
        dist.all_gather_into_tensor(whole, losses, group=spg)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's positions and, from these, of the weights."""
        lm_output, labels, weights = ctx.saved_tensors
        count = len(lm_output)
        own = grad_output.narrow(0, ctx.rank * count, count)
        wanted = iter(labels.t().chunk(ctx.num_chunk))
        to_output, (of_weights,) = _chunked_gradients(
            lambda piece, weight: _loss(piece, weight, next(wanted)),
            lm_output.chunk(ctx.num_chunk),
            (weights,),
            own.chunk(ctx.num_chunk),
        )
        return to_output, None, of_weights, None, None, None, None


def _loss(hidden: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    logits = nn.functional.linear(hidden, weights).float()
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


def _chunked_gradients(
    function: Any,
    pieces: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    grads: tuple[Tensor, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """Run a function of chunks again, one at a time; gradients of the chunks, and the sums of those of its weights."""
    present = [
        weight.detach().requires_grad_() if weight is not None else None for weight in weights
    ]
    to_inputs = []
    sums = [
        None
        if w is None
        else torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        for w in weights
    ]
    for piece, grad in zip(pieces, grads, strict=True):
        with torch.enable_grad():
            own = piece.detach().requires_grad_()
            out = function(own, *present)
        wanted = [weight for weight in present if weight is not None]
        found = iter(torch.autograd.grad(out, [own, *wanted], grad))
        to_inputs.append(next(found))
        for total in sums:
            if total is not None:
                total.add_(next(found))
    kinds = zip(sums, weights, strict=True)
    return torch.cat(to_inputs), [
        None if total is None or weight is None else total.to(weight.dtype)
        for total, weight in kinds
    ]
