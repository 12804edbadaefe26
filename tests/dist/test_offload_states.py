# SPDX-License-Identifier: Apache-2.0
"""State that is moved away and back on two ranks, sharded parameters among it."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.runtime.zero import offload_states as moving
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum


def losses(rank, stage, threshold, move):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    zero = {"stage": stage, "stage3_param_persistence_threshold": threshold}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(model=net, config=config)
    elsewhere = moving._is_away_from
    moving._is_away_from = lambda tensor, tier: True
    batch = torch.randn(2, 7, generator=torch.Generator().manual_seed(rank)).bfloat16()
    found = []
    try:
        for _ in range(4):
            loss = engine(batch).float().square().sum()
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
            if move:
                engine.optimizer.offload_states(device=OffloadDeviceEnum.cpu, non_blocking=True)
                assert engine.optimizer.offloaded_states
                engine.optimizer.reload_states(non_blocking=True)
    finally:
        moving._is_away_from = elsewhere
        engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "threshold"), [(1, 0), (2, 0), (3, 0), (3, 20)])
def test_training_goes_on_bit_for_bit(ranks2, stage, threshold):
    got = ranks2.run(losses, stage, threshold, True)
    assert got == ranks2.run(losses, stage, threshold, False)
    assert got[0][-1] < got[0][0]
