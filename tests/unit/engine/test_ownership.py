# SPDX-License-Identifier: Apache-2.0
"""A model that is given to another engine is trained by that one, and the former says so."""

import pytest
import torch

import deepspeed


def start(model, stage, **more):
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }
    return deepspeed.initialize(model=model, config=config)[0]


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))


def train(engine, x, steps=2):
    losses = []
    for _ in range(steps):
        loss = engine(x).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_second_engine_goes_on_with_the_model(stage):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    plain = net()
    want = []
    for _ in range(2):
        adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            loss = plain(x).pow(2).mean()
            loss.backward()
            adam.step()
            adam.zero_grad()
            want.append(loss.item())
    model = net()
    first = start(model, stage, gradient_clipping=0.0)
    got = train(first, x)
    second = start(model, stage, gradient_clipping=0.0)
    got += train(second, x)
    # fp32 sums in another order
    assert got == pytest.approx(want, rel=1e-5)
    for use in (lambda: first(x), lambda: first.backward(torch.zeros(())), first.step):
        with pytest.raises(RuntimeError, match="no longer trains its model"):
            use()


def test_stages_may_differ_and_bf16_follows_fp32():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    model = net()
    losses = train(start(model, 1), x)
    losses += train(start(model, 0), x)
    losses += train(start(model, 3, bf16={"enabled": True}), x.bfloat16())
    assert losses[-1] < losses[2] < losses[0]


def test_shards_are_not_taken_for_another_stage_or_dtype():
    model = net()
    first = start(model, 3)
    for other in ({"stage": 1}, {"stage": 3, "bf16": {"enabled": True}}):
        with pytest.raises(ValueError, match="build the model again"):
            start(model, **other)
    train(first, torch.randn(4, 8))


def test_an_engine_with_parameters_of_its_own_stays():
    shared = torch.nn.Linear(8, 8)
    one = start(torch.nn.Sequential(shared, torch.nn.Linear(8, 4)), 0)
    start(torch.nn.Sequential(shared, torch.nn.Linear(8, 2)), 0)
    train(one, torch.randn(4, 8))
