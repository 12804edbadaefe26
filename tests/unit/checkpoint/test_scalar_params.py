# SPDX-License-Identifier: Apache-2.0
"""A parameter of no dimensions in checkpoints: its moments look like the numbers that optimizers keep."""

from __future__ import annotations

import torch

import deepspeed


class WithScalar(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.gain = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.layer(x) * self.gain


def with_scalar():
    torch.manual_seed(4)
    net = WithScalar()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)  # its states are saved by parameter
    config = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def two_steps(engine):
    x = torch.linspace(-1, 1, 8).view(2, 4).bfloat16()
    losses = []
    for _ in range(2):
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_the_moments_of_a_0_dim_parameter_are_its_own_at_stage_0(tmp_path):
    first = with_scalar()
    two_steps(first)
    first.save_checkpoint(tmp_path)
    second = with_scalar()
    second.load_checkpoint(tmp_path)
    assert two_steps(second) == two_steps(first)
