# SPDX-License-Identifier: Apache-2.0
"""What the optimizers that exchange signs do with the padding of flat masters."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.fp16.onebit import OnebitAdam, OnebitLamb, ZeroOneAdam, base


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OnebitAdam, {"freeze_step": 2}),
        (OnebitLamb, {"freeze_step": 2}),
        (ZeroOneAdam, {"var_update_scaler": 1}),
        (ZeroOneAdam, {"var_freeze_step": 2, "local_step_clipper": 1}),
    ],
)
def test_padding_stays_zero_where_zero_travels_as_a_sign(kind, options, monkeypatch):
    net = torch.nn.Linear(3, 1, bias=False)  # odd, so the flat master has an element more
    optimizer = kind(net.parameters(), lr=0.1, weight_decay=0.1, **options)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    travelled = []

    def as_signs(values, *_):
        travelled.append(values.numel())
        return torch.where(values >= 0, 1.0, -1.0) * values.norm() / values.numel() ** 0.5

    monkeypatch.setattr(base, "compressed_mean_", as_signs)
    # two ranks, as far as the optimizer knows; gradients are set by hand and never reduced
    monkeypatch.setattr(optimizer, "axis", Axis(None, 2, 0, (0, 1)))
    (master,) = (part.master for group in engine.optimizer.groups for part in group.parts)
    assert master.numel() == 4
    for _ in range(5):
        master.grad = torch.tensor([1.0, -2.0, 3.0, 0.0])
        optimizer.step()
    assert 4 in travelled and master[3] == 0 and bool((master[:3] != 0).all())


def lamb_engine(freeze_step):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    optimizer = OnebitLamb(net.parameters(), lr=0.01, freeze_step=freeze_step)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def lamb_steps(engine, count):
    for _ in range(count):
        engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
    return list(engine.optimizer.state.values())


def test_lamb_compares_momenta_once_and_begins_anew_where_it_has_yet_to_settle(tmp_path):
    engine = lamb_engine(freeze_step=2)
    assert not any("scaling_coeff" in state for state in lamb_steps(engine, 1))
    states = lamb_steps(engine, 1)
    sizes = [s["exp_avg"].square().mean().sqrt().item() for s in states]
    want = [sum(sizes) / len(sizes) / size for size in sizes]
    states = lamb_steps(engine, 2)
    assert [s["scaling_coeff"] for s in states] == pytest.approx(
        want, rel=0.1
    )  # flat ones are padded
    kept = [s["lamb_coeff_freeze"] for s in states]
    engine.save_checkpoint(tmp_path)

    again = lamb_engine(freeze_step=2)
    again.load_checkpoint(tmp_path)
    assert [s["lamb_coeff_freeze"] for s in again.optimizer.state.values()] == kept != [0.0, 0.0]
    assert again.optimizer.optimizer.lamb_freeze_key
    assert not again.optimizer.optimizer.worker_errors

    later = lamb_engine(freeze_step=20)
    later.load_checkpoint(tmp_path)
    for state in later.optimizer.state.values():
        assert (state["lamb_coeff_freeze"], state["last_factor"]) == (0.0, 1.0)
        assert "scaling_coeff" not in state
    assert not later.optimizer.optimizer.lamb_freeze_key
