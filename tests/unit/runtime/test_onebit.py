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
