# SPDX-License-Identifier: Apache-2.0
"""Attention with two biases, as the Evoformer of AlphaFold has it, without ever holding all scores at once.

[Note: Blocks of scores]
Scores of all rows, heads, queries and keys together are what does not fit into memory. Both passes compute them for some
rows, or for some queries of one row, at a time, in fp32 (fp64 for fp64 inputs), and throw them away; the backward pass
has them again from the inputs and the logarithm of each query's sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeed.runtime.torch_autocast import without_autocast
from deepspeed.utils.errors import explain

# scores that are held at once: 64 MB in fp32
_SCORES = 1 << 24


def DS4Sci_EvoformerAttention(
    Q: Tensor, K: Tensor, V: Tensor, biases: Sequence[Tensor | None] = ()
) -> Tensor:
    """`softmax(Q @ K / sqrt(D) + biases) @ V` for each row and head.

    Gradients flow to Q, K, V and to those biases that require them.

    Args:
        Q: `[B, N, L, H, D]`: N rows of L queries by H heads; without biases any number of dimensions before L.
        K, V: `[B, N, M, H, D]`: M keys and values, of Q's dtype and device.
        biases: at most two, either may be None: one for keys of a row, `[B, N, 1, 1, M]`, and one for pairs,
            `[B, 1, H, L, M]`.

    Returns:
        Of Q's shape and dtype.

    Raises:
        AssertionError: more than two biases, or a shape that does not fit.
        ValueError: dtypes or devices that differ, or no floating dtype.
    """
    if len(biases) > 2:
        raise AssertionError(explain("too many biases", got=len(biases), expected="at most two"))
    of_keys, of_pairs = (*biases, None, None)[:2]
    _check(Q, K, V, of_keys, of_pairs)
    if Q.dim() == 5:
        return _EvoformerAttention.apply(Q, K, V, of_keys, of_pairs)
    flat = [tensor.reshape(1, -1, *tensor.shape[-3:]) for tensor in (Q, K, V)]
    return _EvoformerAttention.apply(*flat, None, None).view(Q.shape)


def _check(
    q: Tensor, k: Tensor, v: Tensor, of_keys: Tensor | None, of_pairs: Tensor | None
) -> None:
    expected = (*q.shape[:-3], k.shape[-3] if k.dim() > 2 else 0, *q.shape[-2:])
    if q.dim() < 3 or k.shape != expected or v.shape != k.shape:
        raise AssertionError(
            explain(
                "queries, keys and values do not fit together",
                got=f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}",
                expected="[*, L, H, D], [*, M, H, D] and [*, M, H, D]",
            )
        )
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {}
    if q.dim() == 5:
        rows, count, length, heads, _ = q.shape
        wanted["bias1"] = of_keys, (rows, count, 1, 1, k.shape[2])
        wanted["bias2"] = of_pairs, (rows, 1, heads, length, k.shape[2])
    elif of_keys is not None or of_pairs is not None:
        raise AssertionError(
            explain(
                "biases go with five dimensions", got=tuple(q.shape), expected="[B, N, L, H, D]"
            )
        )
    for name, (bias, shape) in wanted.items():
        if bias is not None and tuple(bias.shape) != shape:
            raise AssertionError(
                explain(f"{name} shape is incorrect", got=tuple(bias.shape), expected=shape)
            )
    given = [tensor for tensor in (q, k, v, of_keys, of_pairs) if tensor is not None]
    kinds = {(tensor.dtype, tensor.device) for tensor in given}
    if len(kinds) > 1 or not q.is_floating_point():
        raise ValueError(
            explain(
                "inputs differ in dtype or device, or are no floating-point numbers",
                got=", ".join(f"{dtype} on {device}" for dtype, device in kinds),
                expected="one floating dtype, one device",
            )
        )


class _EvoformerAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, of_keys: Tensor | None, of_pairs: Tensor | None
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        sums = q.new_empty(
            q.shape[0],
            q.shape[1],
            q.shape[3],
            q.shape[2],
            dtype=torch.promote_types(q.dtype, torch.float32),
        )
        attention(q, k, v, of_keys, of_pairs, out, sums)
        ctx.save_for_backward(q, k, v, of_keys, of_pairs, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, of_keys, of_pairs, out, sums = ctx.saved_tensors
        given = (q, k, v, of_keys, of_pairs)
        needed = (True, True, True, *ctx.needs_input_grad[3:])
        grads = [
            torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
            for t, need in zip(given, needed, strict=True)
        ]
        attention_bwd(grad, q, k, v, out, sums, None, of_keys, of_pairs, *grads)
        return tuple(grads)


@torch.no_grad()
@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    o: Tensor,
    lse: Tensor,
) -> None:
    """The forward pass, written into `o` `[B, N, L, H, D]`, and each query's log-sum-exp into `lse` `[B, N, H, L]`."""
    heads_first = _heads_first(q, k, v, bias1, bias2)
    for at in _blocks(q, k):
        scores = _scores(heads_first, at)
        sums = scores.logsumexp(-1)
        weights = scores.sub_(sums[..., None]).exp_()
        b, rows, queries = at
        values = weights @ heads_first[2][b, rows].to(weights.dtype)
        o[b, rows, queries] = values.transpose(1, 2).to(o.dtype)
        lse[b, rows, :, queries] = sums.to(lse.dtype)


@torch.no_grad()
@without_autocast
def attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    bias1: Tensor | None,
    bias2: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_bias1: Tensor | None,
    grad_bias2: Tensor | None,
) -> None:
    """The backward pass, written into the five last arguments; a bias's may be None or empty.

    Args:
        grad: of `o`.
        o, lse: as `attention` gave them.
        delta: gets the sum of `grad * o` over D, `[B, N, H, L]`; None for no need.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    inputs = _heads_first(q, k, v, bias1, bias2)
    grads, outs = grad.transpose(2, 3), o.transpose(2, 3)
    scale = q.shape[-1] ** -0.5
    sums = [
        None if target is None or target.numel() == 0 else torch.zeros_like(target, dtype=wide)
        for target in (grad_k, grad_v, grad_bias1, grad_bias2)
    ]
    to_k, to_v = (None if s is None else s.transpose(2, 3) for s in sums[:2])
    of_keys, of_pairs = sums[2:]
    for at in _blocks(q, k):
        b, rows, queries = at
        weights = _scores(inputs, at).sub_(lse[b, rows][..., queries, None].to(wide)).exp_()
        of_out = grads[b, rows][:, :, queries].to(wide)
        product = (of_out * outs[b, rows][:, :, queries].to(wide)).sum(-1)
        if delta is not None:
            delta[b, rows][..., queries] = product.to(delta.dtype)
        if to_v is not None:
            to_v[b, rows] += weights.transpose(-1, -2) @ of_out
        of_scores = of_out @ inputs[2][b, rows].to(wide).transpose(-1, -2)
        of_scores.sub_(product[..., None]).mul_(weights)
        if of_keys is not None:
            of_keys[b, rows] += of_scores.sum((1, 2))[:, None, None]
        if of_pairs is not None:
            of_pairs[b, 0, :, queries] += of_scores.sum(0)
        of_scores.mul_(scale)
        grad_q[b, rows, queries] = (
            (of_scores @ inputs[1][b, rows].to(wide)).transpose(1, 2).to(grad_q.dtype)
        )
        if to_k is not None:
            to_k[b, rows] += of_scores.transpose(-1, -2) @ inputs[0][b, rows][:, :, queries].to(
                wide
            )
    for target, total in zip((grad_k, grad_v, grad_bias1, grad_bias2), sums, strict=True):
        if target is not None and total is not None:
            target.copy_(total)


def _heads_first(
    q: Tensor, k: Tensor, v: Tensor, bias1: Tensor | None, bias2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Queries, keys and values as `[B, N, H, L, D]`; a bias without values is none."""
    biases = (None if bias is None or bias.numel() == 0 else bias for bias in (bias1, bias2))
    of_keys, of_pairs = biases
    return q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3), of_keys, of_pairs


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """What is computed at once, `(batch, rows, queries)`; see [Note: Blocks of scores]."""
    batch, count, length, heads, _ = q.shape
    keys = max(1, k.shape[2])
    queries = max(1, min(length, _SCORES // (heads * keys)))
    rows = max(1, _SCORES // (heads * keys * queries)) if queries == length else 1
    for b in range(batch):
        for n in range(0, count, rows):
            for at in range(0, length, queries):
                yield b, slice(n, min(count, n + rows)), slice(at, min(length, at + queries))


def _scores(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    at: tuple[int, slice, slice],
) -> Tensor:
    """Scores of a block, `[rows, H, queries, M]`, biases added."""
    (q, k, _, of_keys, of_pairs), (b, rows, queries) = inputs, at
    wide = torch.promote_types(q.dtype, torch.float32)
    scaled = q[b, rows][:, :, queries].to(wide) * q.shape[-1] ** -0.5
    scores = scaled @ k[b, rows].to(wide).transpose(-1, -2)
    if of_keys is not None:
        scores += of_keys[b, rows].to(wide)
    if of_pairs is not None:
        scores += of_pairs[b, :, :, queries].to(wide)
    return scores
