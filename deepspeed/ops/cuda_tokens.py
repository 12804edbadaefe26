# SPDX-License-Identifier: Apache-2.0
"""Random layer-wise token dropping and channels-last bias additions: kernels on CUDA, torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepspeed.ops import cuda
from deepspeed.ops.packing import NARROW_CODES
from deepspeed.utils.errors import explain

_GRID = 1 << 16
_SORT_LIMIT = 8192  # kSortLimit of csrc/cuda/tokens.cu


def token_sort_(tokens: Tensor, seq_len: int) -> Tensor:
    """Sort the last dimension of int32 tokens ascending, in place; returns them.

    Raises:
        ValueError: they are not int32.
    """
    _check_index(tokens)
    length = tokens.shape[-1]
    launch = cuda.find("token_sort", tokens)
    if launch is None or length > _SORT_LIMIT or not tokens.is_contiguous():
        return tokens.copy_(tokens.sort(-1).values)
    if tokens.numel():
        rows = tokens.numel() // length
        launch(min(rows, _GRID), tokens.data_ptr(), rows, length)
    return tokens


def token_gather(activations: Tensor, index: Tensor, batch_first: bool) -> Tensor:
    """Return the kept tokens: [batch, kept, ...] of [batch, tokens, ...], or with both first dimensions swapped.

    Args:
        activations: any dtype.
        index: int32 [batch, kept], each within the tokens.
        batch_first: which of the two orders the activations have.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, _, rest = _token_shape(activations, index, batch_first)
    keep = index.shape[1]
    head = (batch, keep) if batch_first else (keep, batch)
    launch = cuda.find("token_move", activations)
    if launch is None:
        at = _expanded(index if batch_first else index.t(), rest)
        return activations.gather(1 if batch_first else 0, at)
    out = activations.new_empty(*head, *rest)
    _move(launch, activations.contiguous(), out, index, batch_first, False)
    return out


def token_scatter_(full: Tensor, kept: Tensor, index: Tensor, batch_first: bool) -> Tensor:
    """Write the kept tokens back to their places in `full`, in place; returns it.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    batch, _, rest = _token_shape(full, index, batch_first)
    keep = index.shape[1]
    head = (batch, keep) if batch_first else (keep, batch)
    if kept.shape != (*head, *rest) or kept.dtype != full.dtype or kept.device != full.device:
        raise ValueError(
            explain(
                "the kept tokens do not fit",
                got=f"{tuple(kept.shape)} {kept.dtype}",
                expected=f"{(*head, *rest)} {full.dtype}",
            )
        )
    launch = cuda.find("token_move", full)
    if launch is None or not full.is_contiguous():
        at = _expanded(index if batch_first else index.t(), rest)
        return full.scatter_(1 if batch_first else 0, at, kept)
    _move(launch, full, kept.contiguous(), index, batch_first, True)
    return full


def mask_gather(mask: Tensor, index: Tensor | None, keep: int) -> Tensor:
    """Return attention masks of the kept tokens.

    Args:
        mask: [batch, heads, tokens, tokens], any dtype.
        index: int32 [layers, batch, kept]; the result is [layers, batch, heads, kept, kept] of its rows and columns.
            None takes the first `keep` of both; the result is [batch, heads, keep, keep].
        keep: kept tokens.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if mask.dim() != 4 or mask.shape[2] != mask.shape[3] or not 0 <= keep <= mask.shape[2]:
        raise ValueError(
            explain(
                "no square attention mask",
                got=tuple(mask.shape),
                expected=f"[batch, heads, tokens, tokens] with at least {keep} tokens",
            )
        )
    batch, heads, tokens = mask.shape[:3]
    layers = 1 if index is None else index.shape[0]
    if index is not None:
        _check_index(index)
        if index.shape != (layers, batch, keep) or index.device != mask.device:
            raise ValueError(
                explain("no such index", got=tuple(index.shape), expected=f"(*, {batch}, {keep})")
            )
    launch = cuda.find("mask_slice", mask)
    if launch is None:
        if index is None:
            return mask[:, :, :keep, :keep].contiguous()
        rows = index.long()[:, :, None, :, None].expand(layers, batch, heads, keep, tokens)
        cut = mask[None].expand(layers, *mask.shape).gather(3, rows)
        columns = index.long()[:, :, None, None, :].expand(layers, batch, heads, keep, keep)
        return cut.gather(4, columns)
    out = mask.new_empty(layers, batch, heads, keep, keep)
    mask = mask.contiguous()
    at = 0 if index is None else index.contiguous().data_ptr()
    if out.numel():
        sizes = (layers, batch, heads, tokens, keep, mask.element_size())
        rows = layers * batch * heads * keep
        launch(min(rows, _GRID), mask.data_ptr(), out.data_ptr(), at, *sizes)
    return out if index is not None else out[0]


def bias_add(
    activation: Tensor,
    bias: Tensor,
    other: Tensor | None = None,
    other_bias: Tensor | None = None,
) -> Tensor:
    """Return ``activation + bias [+ other [+ other_bias]]``.

    Args:
        activation: fp16, bf16 or fp32 [batch, channels, height, width] in channels-last memory.
        bias: [channels].
        other: like the activation.
        other_bias: [channels].

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    channels = activation.shape[1] if activation.dim() > 1 else -1
    for given, shape in (
        (bias, (channels,)),
        (other, tuple(activation.shape)),
        (other_bias, (channels,)),
    ):
        if given is None:
            continue
        same = given.dtype == activation.dtype and given.device == activation.device
        if tuple(given.shape) != shape or not same:
            raise ValueError(
                explain(
                    "the terms of a bias addition must match",
                    got=f"{tuple(given.shape)} {given.dtype} on {given.device}",
                    expected=f"{shape} {activation.dtype} on {activation.device}",
                )
            )
    code = NARROW_CODES.get(activation.dtype)
    launch = cuda.find("bias_add", activation) if code is not None else None
    if launch is None or activation.dim() != 4:
        return _bias_add_reference(activation, bias, other, other_bias)
    last = torch.channels_last
    activation = activation.contiguous(memory_format=last)
    other = None if other is None else other.contiguous(memory_format=last)
    out = torch.empty_like(activation, memory_format=last)
    terms = [bias.contiguous(), other, None if other_bias is None else other_bias.contiguous()]
    numel = activation.numel()
    if numel:
        addresses = (0 if term is None else term.data_ptr() for term in (activation, *terms))
        blocks = min(-(-numel // 1024), _GRID)
        launch(blocks, *addresses, out.data_ptr(), code, numel, channels)
    return out


def _bias_add_reference(
    activation: Tensor, bias: Tensor, other: Tensor | None, other_bias: Tensor | None
) -> Tensor:
    tail = (1,) * (activation.dim() - 2)
    total = activation.float() + bias.float().reshape(-1, *tail)
    if other is not None:
        total = total + other.float()
    if other_bias is not None:
        total = total + other_bias.float().reshape(-1, *tail)
    return total.to(activation.dtype)


def _move(
    launch: Callable[..., None],
    full: Tensor,
    kept: Tensor,
    index: Tensor,
    batch_first: bool,
    scatter: bool,
) -> None:
    batch, keep = index.shape
    tokens = full.shape[1 if batch_first else 0]
    row = full[0, 0].numel() * full.element_size() if full.numel() else 0
    index = index.contiguous()
    if row and index.numel():
        addresses = (full.data_ptr(), kept.data_ptr(), index.data_ptr())
        blocks = min(batch * keep, _GRID)
        launch(blocks, *addresses, batch, tokens, keep, row, batch_first, scatter)


def _token_shape(
    activations: Tensor, index: Tensor, batch_first: bool
) -> tuple[int, int, tuple[int, ...]]:
    _check_index(index)
    wanted = activations.shape[0 if batch_first else 1] if activations.dim() >= 2 else -1
    if index.dim() != 2 or index.shape[0] != wanted or index.device != activations.device:
        raise ValueError(
            explain(
                "the index does not fit the activations",
                got=f"{tuple(index.shape)} on {index.device}",
                expected=f"[batch {wanted}, kept] on {activations.device}",
            )
        )
    return wanted, activations.shape[1 if batch_first else 0], tuple(activations.shape[2:])


def _check_index(index: Tensor) -> None:
    if index.dtype != torch.int32:
        raise ValueError(explain("tokens are indexed by int32", got=index.dtype))


def _expanded(index: Tensor, rest: tuple[int, ...]) -> Tensor:
    ones = (1,) * len(rest)
    return index.long().reshape(*index.shape, *ones).expand(*index.shape, *rest)
