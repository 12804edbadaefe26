# SPDX-License-Identifier: Apache-2.0
"""SGD against torch.optim.SGD: its rule, its states, and a momentum that is switched on and off."""

from __future__ import annotations

import copy

import pytest
import torch

from deepspeed.ops.sgd import DeepSpeedCPUSGD
from tests.unit.ops.params import params_of, set_grads, twins

SGD = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "dampening": 0.3},
]


@pytest.mark.parametrize("rule", SGD)
def test_sgd_is_that_of_torch(path, rule):
    params = params_of(((1000,), (7, 5)))
    others = twins(params)
    ours = DeepSpeedCPUSGD(params, lr=0.1, **rule)
    theirs = torch.optim.SGD(others, lr=0.1, **rule)
    for _ in range(3):
        set_grads(params, others)
        ours.step()
        theirs.step()
    # a few roundings a step
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert all(
        ("momentum_buffer" in state) == ("momentum" in rule) for state in ours.state.values()
    )


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("inside", [0.0, 0.9])
def test_sgd_momentum_may_begin_and_pause_at_any_step(path, dampening, inside):
    params = params_of(((1000,), (7, 5)))
    others = twins(params)

    def groups(of):
        # beside a group that has momentum all along, or has none
        return [{"params": of[:1]}, {"params": of[1:], "momentum": inside}]

    ours = DeepSpeedCPUSGD(groups(params), lr=0.1, dampening=dampening)
    theirs = torch.optim.SGD(groups(others), lr=0.1, dampening=dampening)
    for momentum in (0.0, 0.0, 0.9, 0.9, 0.0, 0.9):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["momentum"] = momentum
        set_grads(params, others)
        ours.step()
        theirs.step()
        # a few roundings a step
        for a, b in zip(params, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_states_of_torch_sgd_are_understood():
    params = params_of(((40,),))
    others = twins(params)
    theirs = torch.optim.SGD(others, lr=0.1, momentum=0.9, dampening=0.5)
    set_grads(params, others)
    theirs.step()
    ours = DeepSpeedCPUSGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    with torch.no_grad():
        params[0].copy_(others[0])
    ours.step()
    theirs.step()
    torch.testing.assert_close(params[0], others[0], rtol=1e-6, atol=1e-6)


def test_sgd_refuses_nesterov_without_momentum():
    for rule in ({}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match="Nesterov"):
            DeepSpeedCPUSGD(params_of(), nesterov=True, **rule)
