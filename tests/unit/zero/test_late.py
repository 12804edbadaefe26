# SPDX-License-Identifier: Apache-2.0
"""Ranks vote on late gradients after backward passes that had others inside: each must see that by itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deepspeed


class Net(torch.nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.layer, self.inside = torch.nn.Linear(4, 4), inside

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=True) if self.inside else self.layer(x)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_one_region_is_enough_to_be_seen(inside, plain):
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.1}}
    engine = deepspeed.initialize(model=Net(inside), config=config)[0]
    for _ in range(2):
        loss = engine(torch.ones(1, 4, requires_grad=True)).sum()
        loss.backward() if plain else engine.backward(loss)
        # nothing else tells on one rank: a vote needs others
        assert engine.optimizer.reducer._nested is inside
        engine.step()
