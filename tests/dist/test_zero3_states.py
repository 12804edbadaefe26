# SPDX-License-Identifier: Apache-2.0
"""Masters, states and gradients of single sharded parameters: read and set, whole or this rank's slice."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.utils import (
    get_hp_fragment_mapping,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)


def start(zero):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 3, **zero},
    }
    return deepspeed.initialize(model=net, config=config)[0]


def whole(param):
    with deepspeed.zero.GatheredParameters(param):
        return param.detach().float().clone()


def backward(engine, rank, scale=1.0):
    engine.backward(engine(torch.full((2, 7), 0.5 + rank).bfloat16()).float().sum() * scale)


def reads_and_sets(rank, zeros):
    for zero in zeros:
        engine = start(zero)
        param, other = engine.module[0].weight, engine.module[2].weight
        assert torch.equal(safe_get_full_fp32_param(param), whole(param))
        assert safe_get_full_optimizer_state(param, "exp_avg") is None
        assert safe_get_local_optimizer_state(param, "exp_avg") is None
        assert safe_get_full_grad(param) is None and safe_get_local_grad(param) is None
        backward(engine, rank)
        gradient = safe_get_full_grad(param)
        piece = slice(rank * 18, rank * 18 + 18)
        local = safe_get_local_grad(param)
        assert gradient.shape == (5, 7) and local.shape == (18,)
        own = gradient.reshape(-1)[piece]
        assert gradient.any() and torch.equal(local[: own.numel()], own)
        safe_set_full_grad(param, torch.ones(5, 7))
        safe_set_local_grad(other, torch.full((8,), -1.0 - rank))
        engine.step()
        # Adam's first step is the learning rate against the gradient's sign; the average remembers a tenth of it
        torch.testing.assert_close(
            safe_get_full_optimizer_state(param, "exp_avg"), torch.full((5, 7), 0.1)
        )
        moment = safe_get_full_optimizer_state(other, "exp_avg").reshape(-1)
        torch.testing.assert_close(moment, torch.tensor([-0.1] * 8 + [-0.2] * 7))
        assert torch.equal(
            safe_get_local_optimizer_state(other, "exp_avg")[:7], moment[rank * 8 :][:7]
        )
        assert safe_get_full_optimizer_state(param, "nothing") is None

        safe_set_full_fp32_param(param, torch.arange(35.0).view(5, 7) / 3)
        safe_set_full_optimizer_state(param, torch.full((5, 7), 0.5), "exp_avg")
        safe_set_local_fp32_param(other, torch.full((8,), rank + 1.0))
        safe_set_local_optimizer_state(other, torch.full((8,), rank + 2.0), "exp_avg")
        assert torch.equal(safe_get_full_fp32_param(param), torch.arange(35.0).view(5, 7) / 3)
        assert torch.equal(whole(param), (torch.arange(35.0).view(5, 7) / 3).bfloat16().float())
        halves = [[1.0] * 8 + [2.0] * 7, [2.0] * 8 + [3.0] * 7]
        assert whole(other).reshape(-1).tolist() == halves[0]
        assert safe_get_full_optimizer_state(other, "exp_avg").reshape(-1).tolist() == halves[1]
        assert safe_get_local_fp32_param(other).unique().tolist()[-1] == rank + 1.0
        mapping = get_hp_fragment_mapping(other)
        assert mapping.lp_fragment.float().unique().tolist() == [rank + 1.0]
        with pytest.raises(ValueError, match="another shape"):
            safe_set_full_fp32_param(param, torch.ones(3))
        with pytest.raises(ValueError, match="another size"):
            safe_set_local_fp32_param(param, torch.ones(3))
        with pytest.raises(KeyError, match="no such state"):
            safe_set_local_optimizer_state(param, torch.ones(18), "momentum")
        before = safe_get_full_fp32_param(param)
        backward(engine, rank, 0.0)
        engine.step()
        assert not torch.equal(safe_get_full_fp32_param(param), before)  # by the state that was set
        engine.destroy()
    return True


def test_one_parameters_state_is_read_and_set(ranks2, tmp_path):
    zeros = [
        {"stage3_param_persistence_threshold": 0},
        {
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu", "ratio": 0.5},
            "offload_param": {"device": "cpu"},
        },
        {
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 20,
            "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)},
        },
    ]
    assert ranks2.run(reads_and_sets, zeros) == [True, True]
