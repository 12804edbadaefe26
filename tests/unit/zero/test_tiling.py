# SPDX-License-Identifier: Apache-2.0
"""Tiled layers against the whole layer: values, gradients, shapes of tiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.runtime.zero.tiling import TiledLinear, TiledLinearReturnBias

# Sums over input slices add in another order than the whole layer's: a few ulps of fp64.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def pair(bias=True, **options):
    torch.manual_seed(0)
    whole = nn.Linear(10, 7, bias=bias, dtype=torch.float64)
    tiled = TiledLinear(10, 7, bias=bias, init_linear=whole, dtype=torch.float64, **options)
    return whole, tiled, torch.randn(2, 3, 10, dtype=torch.float64)


def whole_grads(tiled):
    weight = torch.cat([torch.cat([t.weight.grad for t in row], 1) for row in tiled.linears])
    return weight, torch.cat([row[-1].bias.grad for row in tiled.linears])


@pytest.mark.parametrize("ins", [1, 3, 10])
@pytest.mark.parametrize("outs", [1, 2, 7])
def test_equals_the_whole_layer_with_its_gradients(ins, outs):
    whole, tiled, x = pair(in_splits=ins, out_splits=outs)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = tiled(a), whole(b)
    torch.testing.assert_close(got, want, **CLOSE)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **CLOSE)
    torch.testing.assert_close(whole_grads(tiled), (whole.weight.grad, whole.bias.grad), **CLOSE)


def test_tiles_are_laid_by_output_then_input_and_the_last_holds_the_bias():
    tiled = TiledLinear(10, 7, in_splits=3, out_splits=2)
    assert [[tuple(t.weight.shape) for t in row] for row in tiled.linears] == [
        [(4, 4), (4, 3), (4, 3)],
        [(3, 4), (3, 3), (3, 3)],
    ]
    assert [[t.bias is not None for t in row] for row in tiled.linears] == [
        [False, False, True]
    ] * 2


def test_no_bias():
    whole, tiled, x = pair(bias=False, in_splits=2, out_splits=2)
    assert not any("bias" in name for name in tiled.state_dict())
    torch.testing.assert_close(tiled(x), whole(x), **CLOSE)


def test_split_input_and_separate_outputs():
    whole, tiled, x = pair(
        in_splits=3, out_splits=2, input_is_already_split=True, combine_out_splits=False
    )
    outputs = tiled(list(x.split([4, 3, 3], dim=-1)))
    assert [o.shape[-1] for o in outputs] == [4, 3]
    torch.testing.assert_close(torch.cat(outputs, dim=-1), whole(x), **CLOSE)


@pytest.mark.parametrize("given", [torch.ones(2, 10), [torch.ones(2, 5)] * 2])
def test_wrong_number_of_slices_is_an_error(given):
    tiled = TiledLinear(10, 7, in_splits=3, input_is_already_split=True)
    with pytest.raises(AssertionError, match="Col splits 3"):
        tiled(given)


class Apart(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight), self.bias


def test_bias_comes_apart():
    whole = nn.Linear(10, 7)
    x = torch.randn(2, 10)
    options = {"in_splits": 3, "out_splits": 2, "linear_cls": Apart}
    output, bias = TiledLinearReturnBias(10, 7, init_linear=whole, **options)(x)
    assert torch.equal(bias, whole.bias)
    torch.testing.assert_close(output + bias, whole(x))  # fp32, sums in another order
    (first, first_bias), (second, _) = TiledLinearReturnBias(
        10, 7, init_linear=whole, combine_out_splits=False, **options
    )(x)
    assert torch.equal(first_bias, whole.bias[:4])
    torch.testing.assert_close(torch.cat([first, second], -1), output, rtol=0, atol=0)
    assert TiledLinearReturnBias(10, 7, bias=False, **options)(x)[1] is None


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("splits", [0, -1, 11])
def test_splits_out_of_range_are_refused(side, splits):
    with pytest.raises(RuntimeError, match=f"{side} splits must be in range"):
        TiledLinear(10, 10, **{f"{side}_splits": splits})


@pytest.mark.parametrize("other", [nn.Linear(10, 7, bias=False), nn.Linear(10, 8), nn.Linear(9, 7)])
def test_copy_from_another_kind_of_layer_is_refused(other):
    with pytest.raises(AssertionError, match=r"bias|shape"):
        TiledLinear(10, 7, in_splits=2).copy_params_from(other)
