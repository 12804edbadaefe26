# SPDX-License-Identifier: Apache-2.0
"""SuperOffload gives the bits of plain offloading, whatever happens between the steps on trial and the verdict."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_grad
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.helpers.zenflow import batch, config, engine, loss_of, seen, train, weights

PARTS = {"sub_group_size": 16}


def both(run, **more):
    """What `run` gives with plain offloading, and with SuperOffload, and the order of the latter."""
    found = []
    for super_offload in (False, True):
        offload = {"device": "cpu", "super_offload": super_offload, "cpuadam_cores_perc": 0.9}
        made = engine(3, {**PARTS, "offload_optimizer": offload}, **more)
        found.append([run(made), weights(made), seen(made)])
        order = made.optimizer.order
        made.destroy()
    return *found, order


def check_same(plain, other):
    assert plain[0] == other[0]
    for before, after in zip(plain[1:], other[1:], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2, "bf16": {"enabled": True}},
        # the norms of this model's gradients are between 0.5 and 1.8: some steps are clipped, others not
        {"gradient_clipping": 1.0, "bf16": {"enabled": True}},
    ],
)
def test_steps_on_trial_give_the_bits_of_plain_ones(more):
    plain, other, order = both(train, **more)
    check_same(plain, other)
    assert 0 < order.agreed <= order.tried
    assert (order.agreed < order.tried) is ("gradient_clipping" in more)


def test_a_learning_rate_that_is_a_tensor_counts_as_it_is_at_the_step():
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 8)
    asked = config(3, {"offload_optimizer": {"device": "cpu", "super_offload": True}})
    inner = DeepSpeedCPUAdam(net.parameters(), lr=torch.tensor(0.1))
    made = deepspeed.initialize(model=net, config=asked, optimizer=inner)[0]
    before = weights(made)
    made.backward(made(torch.ones(4, 8)).square().mean())
    for trial in made.optimizer.order.trials.values():
        trial.running.result()
    made.optimizer.param_groups[0]["lr"].fill_(0.0)
    made.step()
    assert all(torch.equal(values, before[name]) for name, values in weights(made).items())
    made.destroy()


def test_an_overflow_takes_trials_back():
    def run(made):
        losses = train(made)
        return losses, made.skipped_steps, made.loss_scale()

    scale = {"enabled": True, "initial_scale_power": 15, "loss_scale_window": 2, "hysteresis": 1}
    plain, other, order = both(run, fp16=scale)
    check_same(plain, other)
    assert other[0][1] > 0 and 0 < order.agreed < order.tried


def test_whoever_looks_or_edits_between_backward_and_step_sees_no_trial():
    def run(made):
        train(made, last=2)
        param = made.module.first.weight
        read = []
        for step in range(2, 5):
            before = safe_get_full_fp32_param(param).clone() if step == 2 else None
            made.backward(loss_of(made, *batch(step, 0, 0)))
            if step == 2:
                now = safe_get_full_fp32_param(param)
                read.append(torch.equal(before, now))
            if step == 3:
                safe_set_full_grad(param, torch.ones(5, 7))
            if step == 4:
                made.optimizer.param_groups[0]["lr"] = 0.5
                made.backward(loss_of(made, *batch(9, 0, 0)))
            made.step()
        made.backward(loss_of(made, *batch(5, 0, 0)))
        made.optimizer.zero_grad()
        made.backward(loss_of(made, *batch(6, 0, 0)))
        made.optimizer.param_groups[0]["lr"] = 0.25
        made.step()
        return read

    plain, other, order = both(run)
    check_same(plain, other)
    assert other[0] == [True] and order.agreed < order.tried


def test_gradients_that_are_not_finite_leave_everything_as_it_was():
    offload = {"device": "cpu", "super_offload": True}
    made = engine(3, {**PARTS, "offload_optimizer": offload})
    assert isinstance(made.optimizer, SuperOffloadOptimizer_Stage3)
    train(made, last=2)
    before = weights(made)
    made.backward(loss_of(made, *batch(2, 0, 0)) * float("inf"))
    with pytest.raises(FloatingPointError):
        made.step()
    after = weights(made)
    assert all(torch.equal(before[name], after[name]) for name in before)
    made.destroy()


def test_states_that_are_elsewhere_are_refused_by_name():
    with pytest.raises(DeepSpeedConfigError, match="SuperOffload"):
        engine(3, {"offload_optimizer": {"device": "none", "super_offload": True}})
    with pytest.raises(DeepSpeedConfigError, match="two orders"):
        engine(3, {"offload_optimizer": {"device": "cpu", "super_offload": True}, "zenflow": {}})


def test_below_stage_3_a_warning_says_that_it_does_nothing(caplog, monkeypatch):
    from deepspeed.utils.logging import logger

    monkeypatch.setattr(logger, "propagate", True)
    engine(2, {"offload_optimizer": {"device": "cpu", "super_offload": True}}).destroy()
    assert "super_offload does nothing at ZeRO stage 2" in caplog.text
