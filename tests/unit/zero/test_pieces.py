# SPDX-License-Identifier: Apache-2.0
"""A torch optimizer that sees a slab in pieces does what it does to the whole, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch

from deepspeed.runtime.zero import pieces

RULES = {
    "adam": functools.partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1),
    "adam_foreach": functools.partial(torch.optim.Adam, lr=1e-2, foreach=True),
    "adamw_amsgrad": functools.partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-2),
    "sgd_momentum": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-2, centered=True, momentum=0.5),
}
NUMEL = 5 * 64 + 7


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "CPU_PIECE_NUMEL", 64)


def params_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (NUMEL, 3, 128)]


def give_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("rule", RULES)
def test_pieces_give_the_bits_of_the_whole(rule):
    whole, cut = params_of(), params_of()
    reference, ours = RULES[rule](whole), RULES[rule](cut)
    for step in range(4):
        give_grads(whole, step)
        give_grads(cut, step)
        reference.step()
        with pieces.in_pieces(ours):
            ours.step()
    for expected, got in zip(whole, cut, strict=True):
        assert torch.equal(expected, got)
        assert reference.state[expected].keys() == ours.state[got].keys()
        for name, value in reference.state[expected].items():
            found = ours.state[got][name]
            assert torch.equal(value, found) if torch.is_tensor(value) else value == found, name
    assert set(ours.state) <= set(cut)
    assert [p for group in ours.param_groups for p in group["params"]] == cut


@pytest.mark.usefixtures("small_pieces")
def test_large_parameters_are_cut_once_they_have_a_state():
    params = params_of()
    optimizer = RULES["adam"](params)
    give_grads(params, 0)
    with pieces.in_pieces(optimizer):
        assert optimizer.param_groups[0]["params"] == params
        optimizer.step()
    with pieces.in_pieces(optimizer):
        shown = optimizer.param_groups[0]["params"]
        assert [p.numel() for p in shown] == [64] * 5 + [7, 3] + [64] * 2
        assert shown[1].data_ptr() == params[0].data_ptr() + 64 * 4


@pytest.mark.usefixtures("small_pieces")
def test_optimizer_is_whole_again_after_a_step_that_failed():
    params = params_of()
    optimizer = RULES["adam"](params)
    give_grads(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="stop"), pieces.in_pieces(optimizer):
        raise RuntimeError("stop")
    assert optimizer.param_groups[0]["params"] == params
    assert set(optimizer.state) == set(params)


@pytest.mark.usefixtures("small_pieces")
def test_rules_that_may_look_at_whole_tensors_are_left_alone():
    class Normed(torch.optim.Adam):
        pass

    params = params_of()
    optimizer = Normed(params)
    give_grads(params, 0)
    optimizer.step()
    with pieces.in_pieces(optimizer):
        assert optimizer.param_groups[0]["params"] == params
