# SPDX-License-Identifier: Apache-2.0
"""What `zero_optimization.ignore_unused_parameters` says of parameters without a gradient."""

from __future__ import annotations

import pytest
import torch

import deepspeed


class Idle(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
        self.also = False

    def forward(self, x):
        return (self.used(x) + (self.idle(x) if self.also else 0.0)).sum()


def engine_of(net, stage, ignore):
    cfg = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "ignore_unused_parameters": ignore},
    }
    return deepspeed.initialize(model=net, config=cfg)[0]


def train(engine, used_in=()):
    for micro in range(2):
        engine.module.also = micro in used_in
        engine.backward(engine(torch.ones(1, 3)))
        engine.step()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_unused_parameter_is_named_if_all_are_to_be_used(stage):
    net = Idle()
    before = [p.detach().clone() for p in net.parameters()]
    engine = engine_of(net, stage, ignore=False)
    with pytest.raises(AssertionError, match=r"idle\.weight.*\n?.*ignore_unused_parameters"):
        train(engine)
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        for p, old in zip(net.parameters(), before, strict=True):
            assert torch.equal(p, old)
    train(engine, used_in=[1])  # one micro-batch of the accumulation is enough
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        assert not torch.equal(net.idle.weight, before[2])


def test_unused_parameters_are_ignored_by_default():
    engine = engine_of(Idle(), 2, ignore=True)
    train(engine)
    assert engine.global_steps == 1
