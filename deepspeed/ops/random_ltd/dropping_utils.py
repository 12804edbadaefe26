# SPDX-License-Identifier: Apache-2.0
"""The kept tokens of random-LTD: which, their part of the attention mask, and the way there and back with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspeed.ops import cuda_tokens
from deepspeed.utils.errors import explain


def _draw(keep: int, seq_length: int, batch: int, layers: int, device: Any) -> Tensor:
    if not 0 <= keep <= seq_length:
        raise ValueError(
            explain("tokens to keep", got=keep, expected=f"0 to the sequence's {seq_length}")
        )
    chance = torch.rand(layers, batch, seq_length, device=device)
    index = chance.topk(keep, dim=-1, sorted=False).indices.to(torch.int32)
    return cuda_tokens.token_sort_(index, seq_length)


def gpt_sample_tokens(
    reserved_length: int,
    seq_length: int,
    batch_size: int,
    layers: int = 1,
    device: Any = "cpu",
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw the tokens that a decoder's layers keep.

    Args:
        reserved_length: kept tokens of each sequence.
        seq_length: tokens of each sequence.
        batch_size: sequences.
        layers: layers that each draw their own.
        device: of the result.
        attn_mask: [batch or 1, heads or 1, tokens, tokens], or [batch, tokens]; None for none.

    Returns:
        int32 [layers, batch, kept], ascending, each set of tokens as likely as any other; and the mask of the kept ones.
        A mask that all sequences share is taken to be causal, so its first rows and columns do for every layer. Masks of
        each sequence are cut to the tokens of the first layer.

    Raises:
        ValueError: more tokens to keep than there are, or a mask of another shape.
    """
    index = _draw(reserved_length, seq_length, batch_size, layers, device)
    if attn_mask is None:
        return index, None
    if attn_mask.dim() == 4 and attn_mask.shape[0] == 1 and attn_mask.shape[2] == seq_length:
        return index, cuda_tokens.mask_gather(attn_mask, None, reserved_length)
    return index, _cut_masks(attn_mask, index[:1], seq_length)[0]


def bert_sample_tokens(
    reserved_length: int,
    seq_length: int,
    batch_size: int,
    layers: int = 1,
    device: Any = "cpu",
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw the tokens that an encoder's layers keep; as `gpt_sample_tokens`, but each layer gets a mask of its own.

    Returns:
        int32 [layers, batch, kept], ascending; and [layers, ...the mask's shape] cut to each layer's tokens.
    """
    index = _draw(reserved_length, seq_length, batch_size, layers, device)
    return index, None if attn_mask is None else _cut_masks(attn_mask, index, seq_length)


def _cut_masks(mask: Tensor, index: Tensor, seq_length: int) -> Tensor:
    """The rows and columns of a mask that belong to kept tokens, for each layer of `index`."""
    layers, batch, keep = index.shape
    shape = tuple(mask.shape)
    fits = mask.dim() in (2, 4) and shape[0] in (1, batch) and shape[-1] == seq_length
    if not fits or (mask.dim() == 4 and shape[2] not in (1, seq_length)):
        raise ValueError(
            explain(
                "the attention mask does not fit the hidden states",
                got=shape,
                expected=f"({batch}, heads, {seq_length}, {seq_length}) or ({batch}, {seq_length}), with 1 for all",
            )
        )
    mask = mask.expand(batch, *shape[1:])
    if mask.dim() == 4 and shape[2] == seq_length:
        return cuda_tokens.mask_gather(mask, index, keep)
    rows = mask[None].expand(layers, *mask.shape)
    at = index.long().reshape(layers, batch, *(1,) * (mask.dim() - 2), keep)
    return rows.gather(-1, at.expand(*rows.shape[:-1], keep))


def take_tokens(values: Any, index: Tensor, seq_length: int) -> Any:
    """The entries of kept tokens in what has one for each token; tuples, by their parts.

    Args:
        values: [tokens], or [batch or 1, tokens, ...]; what has another second dimension stays as it is.
        index: int32 [batch, kept].
        seq_length: tokens.

    Returns:
        [batch, kept, ...].
    """
    if isinstance(values, tuple | list):
        return type(values)(take_tokens(value, index, seq_length) for value in values)
    if not isinstance(values, Tensor) or not values.dim():
        return values
    whole = values[None] if values.dim() == 1 else values
    if whole.shape[1] != seq_length:
        return values
    whole = whole.expand(index.shape[0], *whole.shape[1:])
    return cuda_tokens.token_gather(whole, index.to(whole.device), True)


class GatherTokens(torch.autograd.Function):
    """Take the kept tokens out: `apply(activations, sorted_indices, batch_first)` -> all of them, and the kept ones.

    ``activations`` are [batch, tokens, ...], or with both dimensions swapped; ``sorted_indices`` int32 [batch, kept].
    """

    @staticmethod
    def forward(
        ctx: Any, activations: Tensor, sorted_indices: Tensor, batch_first: bool
    ) -> tuple[Tensor, Tensor]:
        """Both, the first of them unchanged."""
        ctx.save_for_backward(sorted_indices)
        ctx.batch_first = batch_first
        kept = cuda_tokens.token_gather(activations, sorted_indices, batch_first)
        return activations.view_as(activations), kept

    @staticmethod
    def backward(ctx: Any, a_gradients: Tensor, g_gradients: Tensor) -> Any:
        """The gradients of the kept tokens are added at their places."""
        (index,) = ctx.saved_tensors
        own = cuda_tokens.token_gather(a_gradients, index, ctx.batch_first)
        total = a_gradients.clone(memory_format=torch.contiguous_format)
        cuda_tokens.token_scatter_(total, own + g_gradients, index, ctx.batch_first)
        return total, None, None


class ScatterTokens(torch.autograd.Function):
    """Put the kept tokens back: `apply(all_activations, layer_activations, sorted_indices, batch_first)` -> all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        all_activations: Tensor,
        layer_activations: Tensor,
        sorted_indices: Tensor,
        batch_first: bool,
    ) -> Tensor:
        """A new tensor; neither argument is changed."""
        ctx.save_for_backward(sorted_indices)
        ctx.batch_first = batch_first
        whole = all_activations.clone(memory_format=torch.contiguous_format)
        kept = layer_activations.to(whole.dtype)
        ctx.kept_dtype = layer_activations.dtype
        return cuda_tokens.token_scatter_(whole, kept, sorted_indices, batch_first)

    @staticmethod
    def backward(ctx: Any, out_gradients: Tensor) -> Any:
        """Gradients of kept tokens go to the layer, the others past it."""
        (index,) = ctx.saved_tensors
        kept = cuda_tokens.token_gather(out_gradients, index, ctx.batch_first)
        past = out_gradients.clone(memory_format=torch.contiguous_format)
        cuda_tokens.token_scatter_(past, torch.zeros_like(kept), index, ctx.batch_first)
        return past, kept.to(ctx.kept_dtype), None, None
