# SPDX-License-Identifier: Apache-2.0
"""FPDT's layers on any number of ranks against dense ones on the whole sequence."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from deepspeed.sequence.fpdt_layer import FPDT_Attention, FPDT_InputConstruct, FPDT_LogitsLoss

LENGTH, BATCH, HIDDEN, HEADS, HEAD = 24, 2, 12, 4, 6


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def own(values, chunk, ranks, rank):
    """A rank's positions of `[sequence, batch, ...]`."""
    args = SimpleNamespace(ds_sequence_parallel_fpdt_chunk_size=chunk)
    made = FPDT_InputConstruct(values.transpose(0, 1), None, None, None, None, args, ranks, rank)
    return made.generate()[0].transpose(0, 1)


def dense_attention(x, first, first_bias, second, angles, kv_heads):
    joint = linear(x, first, first_bias).unflatten(-1, (-1, HEAD))
    q, k, v = joint.split([HEADS, kv_heads, kv_heads], 2)
    if angles is not None:
        cos, sin = angles
        width = cos.shape[-1]

        def turn(t):
            a, b = t[..., :width].chunk(2, -1)
            return torch.cat(
                (t[..., :width] * cos + torch.cat((-b, a), -1) * sin, t[..., width:]), -1
            )

        q, k = turn(q), turn(k)
    k, v = (t.repeat_interleave(HEADS // kv_heads, 2) for t in (k, v))
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) / HEAD**0.5
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return linear(torch.einsum("bnqk,kbnd->qbnd", weights, v).flatten(2), second)


def check_attention(rank, ranks, chunk, kv_heads=HEADS, rotary=0, offload=True, group=None):
    """Compare values and gradients of this rank's share; gradients of weights are summed over the ranks."""
    torch.manual_seed(11)
    x, bias = numbers(LENGTH, BATCH, HIDDEN), numbers((HEADS + 2 * kv_heads) * HEAD)
    first, second = numbers((HEADS + 2 * kv_heads) * HEAD, HIDDEN), numbers(HIDDEN, HEADS * HEAD)
    angles = None
    if rotary:
        turns = torch.rand(LENGTH, 1, 1, rotary, dtype=torch.float64)
        angles = turns.cos(), turns.sin()
    seed = torch.randn(LENGTH, BATCH, HIDDEN, dtype=torch.float64)
    expected = dense_attention(x, first, bias, second, angles, kv_heads)
    given = (x, first, bias, second)
    wanted = torch.autograd.grad(expected, given, seed)
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        kv_channels=HEAD,
        num_key_value_heads=kv_heads,
    )
    layer = FPDT_Attention(
        config, first, bias, second, None, group, chunk_size=chunk, enable_offloading=offload
    )
    mine = own(x.detach(), chunk, ranks, rank).requires_grad_()
    got, no_bias = layer(mine, None, None, angles)
    assert no_bias is None
    torch.testing.assert_close(got, own(expected, chunk, ranks, rank))
    found = torch.autograd.grad(got, (mine, *given[1:]), own(seed, chunk, ranks, rank))
    torch.testing.assert_close(found[0], own(wanted[0], chunk, ranks, rank))
    for part, whole in zip(found[1:], wanted[1:], strict=True):
        if ranks > 1:
            torch.distributed.all_reduce(part)
        torch.testing.assert_close(part, whole)


def check_loss(rank, ranks, pieces, group=None):
    """Losses come for all ranks, gradients for this one's positions."""
    torch.manual_seed(5)
    count = LENGTH // ranks
    hidden, weights = numbers(LENGTH, BATCH, HIDDEN), numbers(9, HIDDEN)
    labels = torch.randint(0, 9, (BATCH, LENGTH))
    labels[0, 3] = -100
    losses = cross_entropy(
        linear(hidden, weights).flatten(0, 1), labels.t().flatten(), reduction="none"
    ).view(LENGTH, BATCH)
    seed = torch.rand(LENGTH, BATCH)
    wanted = torch.autograd.grad(losses, (hidden, weights), seed.double())
    part = slice(rank * count, (rank + 1) * count)
    mine = hidden.detach()[part].requires_grad_()
    got = FPDT_LogitsLoss.apply(mine, labels[:, part], weights, rank, ranks, group, pieces)
    torch.testing.assert_close(got, losses.float())
    found = torch.autograd.grad(got, (mine, weights), seed)
    if ranks > 1:
        torch.distributed.all_reduce(found[1])
    # logits and the softmax over them are in fp32
    torch.testing.assert_close(found[0], wanted[0][part], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)


def dense_mlp(x, w1, b1, w2, b2):
    return nn.functional.linear(nn.functional.gelu(linear(x, w1, b1), approximate="tanh"), w2, b2)
