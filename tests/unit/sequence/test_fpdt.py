# SPDX-License-Identifier: Apache-2.0
"""Attention, MLP and loss of long sequences, chunk by chunk, on one rank; on two: tests/dist/test_sequence_parallel.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deepspeed.sequence import chunk_attention
from deepspeed.sequence.fpdt_layer import (
    FPDT_FFN,
    FPDT_Attention,
    FPDT_InputConstruct,
    SequenceChunk,
)
from tests.helpers.long_sequences import (
    HEAD,
    HEADS,
    HIDDEN,
    check_attention,
    check_loss,
    dense_mlp,
    numbers,
)


@pytest.mark.parametrize("tile", [1, 200, 1 << 24])
@pytest.mark.parametrize(("chunk", "kv_heads"), [(24, 4), (8, 4), (4, 2), (12, 1)])
def test_attention_by_chunks_is_dense_attention(monkeypatch, tile, chunk, kv_heads):
    monkeypatch.setattr(chunk_attention, "_SCORES", tile)
    check_attention(0, 1, chunk, kv_heads)


@pytest.mark.parametrize("rotary", [HEAD, 4])
@pytest.mark.parametrize("offload", [False, True])
def test_queries_and_keys_turn_with_their_positions(rotary, offload):
    check_attention(0, 1, 8, 2, rotary, offload)


@pytest.mark.parametrize("pieces", [1, 3])
def test_losses_by_chunks(pieces):
    check_loss(0, 1, pieces)


@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("chunk", [3, 4, 100])
def test_an_mlp_by_chunks(add_bias, chunk):
    torch.manual_seed(2)
    given = (numbers(8, 2, 5), numbers(7, 5), numbers(7), numbers(5, 7), numbers(5))
    got, bias = FPDT_FFN.apply(*given, add_bias, chunk)
    assert (bias is None) is add_bias
    whole = got if add_bias else got + bias
    expected = dense_mlp(*given)
    torch.testing.assert_close(whole, expected)
    seed = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(whole, given, seed),
        torch.autograd.grad(expected, given, seed),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def construct(chunk, ranks, rank, length=8):
    args = SimpleNamespace(ds_sequence_parallel_fpdt_chunk_size=chunk)
    places = torch.arange(length)[None]
    mask = torch.zeros(1, 1)
    return FPDT_InputConstruct(places, places + 100, places * 1.0, mask, places, args, ranks, rank)


def test_each_rank_has_a_piece_of_each_chunk():
    tokens, labels, loss_mask, mask, places = construct(4, 2, 1).generate()
    assert tokens.tolist() == [[2, 3, 6, 7]] == places.tolist()
    assert labels.tolist() == [[102, 103, 106, 107]]
    assert loss_mask.tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]]  # of all ranks, one after the other
    assert mask.shape == (1, 1)
    assert construct(64, 2, 0).generate()[0].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("chunk", "ranks"), [(3, 1), (4, 3)])
def test_sequences_that_do_not_divide_are_named(chunk, ranks):
    with pytest.raises(AssertionError, match="does not divide into chunks"):
        construct(chunk, ranks, 0)


def test_what_training_does_not_need_is_refused():
    config = SimpleNamespace(hidden_size=HIDDEN, num_attention_heads=HEADS, kv_channels=HEAD)
    first, second = torch.zeros(3 * HEADS * HEAD, HIDDEN), torch.zeros(HIDDEN, HEADS * HEAD)
    bias = torch.ones(HIDDEN)
    layer = FPDT_Attention(config, first, None, second, bias, None, return_bias=False)
    x = torch.zeros(4, 1, HIDDEN)
    out, none = layer(x, None, None, None)
    assert none is None and torch.equal(out, torch.ones(4, 1, HIDDEN))
    with pytest.raises(NotImplementedError, match="for training"):
        layer(x, None, object(), None)


def test_a_chunk_comes_and_goes():
    chunk = SequenceChunk(torch.ones(3))
    with pytest.raises(AssertionError, match="load_to_gpu"):
        chunk.get_gpu_chunk()
    chunk.load_to_gpu()
    assert torch.equal(chunk.get_gpu_chunk(), torch.ones(3))
    chunk.gpu_chunk = torch.zeros(3)
    chunk.overwrite_to_cpu()
    chunk.offload()
    chunk.load_to_gpu()
    assert torch.equal(chunk.get_gpu_chunk(), torch.zeros(3))


def test_autocast_does_not_narrow_scores():
    q, k, v = (torch.randn(1, 2, 1, 8, 4) * 4 for _ in range(3))
    found = []
    for casts in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            out, sums = chunk_attention.attend(q, k, v, 0.5, causal=True)
            grads = chunk_attention.attend_backward(
                out, (q, k, v), sums, (out * out).sum(-1), 0.5, causal=True
            )
        found.append([out, sums, *grads])
    for narrow, wide in zip(*found, strict=True):
        assert torch.equal(narrow, wide)
