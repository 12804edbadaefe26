# SPDX-License-Identifier: Apache-2.0
"""Attention with two biases: values and gradients against plain torch in float64, in blocks of any size."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention, evoformer_attn
from deepspeed.ops.op_builder import EvoformerAttnBuilder

B, N, L, M, H, D = 2, 3, 6, 5, 2, 4
SHAPES = [(B, N, L, H, D), (B, N, M, H, D), (B, N, M, H, D), (B, N, 1, 1, M), (B, 1, H, L, M)]


def inputs(dtype=torch.float64, biases=(True, True)):
    torch.manual_seed(3)
    wanted = (True, True, True, *biases)
    made = [torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
    made[3][0, 0, 0, 0, 1] = -1e4  # a key that is masked out
    return [t.requires_grad_() if w else None for t, w in zip(made, wanted, strict=True)]


def reference(q, k, v, *biases):
    """Plain attention in float64."""
    q, k, v = (t.double().transpose(-2, -3) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / D**0.5
    for bias in biases:
        if bias is not None:
            scores = scores + bias.double()
    return (scores.softmax(-1) @ v).transpose(-2, -3)


def gradients(out, given, seed):
    present = [t for t in given if t is not None]
    return torch.autograd.grad(out, present, seed.to(out.dtype))


@pytest.mark.parametrize("held", [1, H * M * 4, H * M * L * 2, 1 << 24])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_values_and_gradients_are_those_of_plain_attention(monkeypatch, held, biases):
    monkeypatch.setattr(evoformer_attn, "_SCORES", held)
    given = inputs(biases=biases)
    found = DS4Sci_EvoformerAttention(*given[:3], given[3:])
    expected = reference(*given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn(found.shape, dtype=torch.float64)
    for one, other in zip(
        gradients(found, given, seed), gradients(expected, given, seed), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    # a rounding of values below 4
    ("dtype", "error"),
    [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)],
)
def test_small_floats_round_once(dtype, error):
    given = inputs(dtype)
    found = DS4Sci_EvoformerAttention(*given[:3], given[3:])
    expected = reference(*given)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=error)
    seed = torch.randn(found.shape).to(dtype)
    pairs = zip(gradients(found, given, seed), gradients(expected, given, seed), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=2 * error)


def test_autocast_does_not_narrow_scores():
    q, k, v = (torch.randn(1, 2, 16, 2, 8, requires_grad=True) for _ in range(3))
    found = []
    for casts in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            output = DS4Sci_EvoformerAttention(q * 4, k, v, [])
        found.append([output, *torch.autograd.grad(output.square().sum(), [q, k, v])])
    for narrow, wide in zip(*found, strict=True):
        assert torch.equal(narrow, wide)


def test_only_wanted_gradients_come():
    given = inputs()
    masks = given[3].detach()
    out = DS4Sci_EvoformerAttention(*given[:3], [masks, None])
    out.sum().backward()
    assert masks.grad is None and given[0].grad is not None
    with torch.no_grad():
        assert not DS4Sci_EvoformerAttention(*given[:3], []).requires_grad


def test_without_biases_any_leading_dimensions():
    q, k, v, *_ = inputs(biases=(False, False))
    found = DS4Sci_EvoformerAttention(q[0, 0], k[0, 0], v[0, 0], [])
    torch.testing.assert_close(found, reference(q, k, v)[0, 0])


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_no_block_is_larger_than_what_may_be_held(rows):
    q = torch.empty(1, rows, 4096, 8, 16, device="meta")
    blocks = list(evoformer_attn._blocks(q, q))
    sizes = [(n.stop - n.start) * (at.stop - at.start) * 8 * 4096 for _, n, at in blocks]
    assert max(sizes) <= evoformer_attn._SCORES
    assert sum(sizes) == rows * 4096 * 8 * 4096


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({3: (B, N, 1, M, 1)}, AssertionError, "bias1 shape is incorrect"),
        ({4: (B, 1, H, L, L)}, AssertionError, "bias2 shape is incorrect"),
        ({1: (B, N, M, H, D + 1)}, AssertionError, "do not fit together"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, error, words):
    given = inputs()
    for index, shape in change.items():
        given[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(error, match=words):
        DS4Sci_EvoformerAttention(*given[:3], given[3:])


def test_other_mistakes_are_named():
    given = inputs()
    with pytest.raises(AssertionError, match="at most two"):
        DS4Sci_EvoformerAttention(*given[:3], [None, None, None])
    with pytest.raises(AssertionError, match="five dimensions"):
        DS4Sci_EvoformerAttention(*(t[0] for t in given[:3]), given[3:])
    with pytest.raises(ValueError, match="differ in dtype"):
        DS4Sci_EvoformerAttention(given[0].float(), *given[1:3], [])


def test_the_builder_gives_both_passes():
    op = EvoformerAttnBuilder().load()
    q, k, v, first, _ = (t.detach() for t in inputs())
    out, sums = torch.empty_like(q), q.new_empty(B, N, H, L)
    op.attention(q, k, v, first, q.new_empty(0), out, sums)
    torch.testing.assert_close(out, reference(q, k, v, first))
    grads = [torch.empty_like(t) for t in (q, k, v)]
    seed, delta = torch.randn_like(out), torch.empty_like(sums)
    empty = q.new_empty(0)
    op.attention_bwd(seed, q, k, v, out, sums, delta, first, empty, *grads, empty, empty)
    torch.testing.assert_close(delta, (seed * out).sum(-1).transpose(2, 3))
    given = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(reference(*given, first), given, seed)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other)
