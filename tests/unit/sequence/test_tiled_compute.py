# SPDX-License-Identifier: Apache-2.0
"""What is computed in tiles of the sequence has the values and the gradients of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.runtime.sequence_parallel.ulysses_sp import (
    AutogradComputeMLP,
    TiledFusedLogitsLoss,
    TiledMLP,
    sequence_tiled_compute,
)

# Tiles add up gradients of the weights in another order: a few ulps of float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 16).double(), nn.Linear(16, 4).double()

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def grads_of(net, x):
    return [x.grad] + [p.grad for p in net.parameters()]


def inputs(*shape, wants_grad=True):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(wants_grad)


@pytest.mark.parametrize("shape", [(2, 6, 4), (7, 4), (1, 7, 4)])
@pytest.mark.parametrize("shards", [1, 3, 4, 100])
def test_tiled_mlp_is_the_mlp(shape, shards):
    net, other = Block(), Block()
    x, y = inputs(*shape), inputs(*shape)
    whole = net(x)
    tiled = TiledMLP.apply(Block.forward, other, y, shards, list(other.parameters()))
    torch.testing.assert_close(tiled, whole, **CLOSE)
    weight = torch.randn_like(whole)
    (whole * weight).sum().backward()
    (tiled * weight).sum().backward()
    for got, want in zip(grads_of(other, y), grads_of(net, x), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_parameters_get_gradients_where_the_input_wants_none():
    net, other = Block(), Block()
    x = inputs(2, 6, 4, wants_grad=False)
    net(x).sum().backward()
    TiledMLP.apply(Block.forward, other, x, 3, list(other.parameters())).sum().backward()
    for got, want in zip(other.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, **CLOSE)


def test_gradient_is_announced_as_ready_with_the_last_tile_only():
    net, x = Block(), inputs(1, 6, 4)
    seen = []
    net.up.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.ds_grad_is_ready))
    TiledMLP.apply(Block.forward, net, x, 3, list(net.parameters())).sum().backward()
    assert seen == [False, False, True]


def test_mlp_that_runs_again_for_its_gradients():
    net, other = Block(), Block()
    x, y = inputs(2, 3, 4), inputs(2, 3, 4)
    net(x).square().sum().backward()
    AutogradComputeMLP.apply(Block.forward, other, y).square().sum().backward()
    for got, want in zip(grads_of(other, y), grads_of(net, x), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_tiled_loss_is_the_loss(reduction, masked):
    head, other = (nn.Linear(4, 5).double() for _ in range(2))
    other.load_state_dict(head.state_dict())
    x, y = inputs(2, 5, 4), inputs(2, 5, 4)
    labels = torch.arange(10).view(2, 5) % 5
    mask = (torch.arange(10).view(2, 5) % 3 != 0).double() if masked else None

    def loss(self, hidden, target, keep=None):
        each = nn.functional.cross_entropy(self(hidden), target, reduction="none")
        each = each if keep is None else each * keep
        return each.mean() if reduction == "mean" else each.sum()

    whole = loss(head, x.flatten(0, 1), labels.flatten(), None if mask is None else mask.flatten())
    tiled = TiledFusedLogitsLoss.apply(
        loss, other, y, labels, mask, 4, list(other.parameters()), reduction
    )
    torch.testing.assert_close(tiled, whole, **CLOSE)
    (whole * 3).backward()
    (tiled * 3).backward()
    for got, want in zip(grads_of(other, y), grads_of(head, x), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_rounded_shares_of_a_16_bit_loss_do_not_add_up():
    torch.manual_seed(0)
    x = torch.randn(1, 425, 8).bfloat16().requires_grad_()
    labels = torch.zeros(1, 425, dtype=torch.long)
    head = nn.Linear(8, 3).bfloat16()

    def loss(self, hidden, target):
        return (
            hidden.float().sum(-1).mul(len(hidden)).mean().bfloat16()
        )  # each position's share is 1

    TiledFusedLogitsLoss.apply(loss, head, x, labels, None, 2, list(head.parameters())).backward()
    # 213/425 and 212/425 are no bf16 numbers; their rounded forms must make 1 together
    assert x.grad[0, 0, 0].double() + x.grad[0, -1, 0].double() == 1


def test_named_arguments_are_cut_or_passed():
    net, other = Block(), Block()
    x, y = inputs(2, 6, 4), inputs(2, 6, 4)
    scale = torch.rand(2, 6, 1, dtype=torch.float64)

    def run(owner):
        return lambda hidden, scale, power: owner(hidden * scale) ** power

    whole = run(net)(x, scale, 2)
    tiled = sequence_tiled_compute(
        run(other),
        6,
        4,
        {"hidden": y, "scale": scale},
        {"power": 2},
        "hidden",
        list(other.parameters()),
        output_unshard_dimension=1,
        output_reduction=None,
    )
    torch.testing.assert_close(tiled, whole, **CLOSE)
    whole.sum().backward()
    tiled.sum().backward()
    for got, want in zip(grads_of(other, y), grads_of(net, x), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_losses_of_tiles_are_averaged_over_positions():
    x = inputs(1, 7, 4)
    loss = sequence_tiled_compute(
        lambda x: x.mean(), 7, 2, {"x": x}, {}, "x", output_unshard_dimension=0
    )
    torch.testing.assert_close(loss, x.mean(), **CLOSE)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad_requiring_tensor_key": "power"}, "one of \\['hidden'\\]"),
        ({"seqlen": 5}, "\\[batch, 5, ...\\]"),
        ({"shards": 0}, "cannot be cut"),
        ({"output_unshard_dimension": 0, "output_reduction": "max"}, "unknown reduction"),
    ],
)
def test_what_cannot_be_cut_is_refused(change, message):
    given = {
        "fn": lambda hidden, power: hidden,
        "seqlen": 6,
        "shards": 2,
        "kwargs_to_shard": {"hidden": inputs(2, 6, 4)},
        "kwargs_to_pass": {"power": 2},
        "grad_requiring_tensor_key": "hidden",
    }
    with pytest.raises(ValueError, match=message):
        sequence_tiled_compute(**{**given, **change})
