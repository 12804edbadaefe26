# SPDX-License-Identifier: Apache-2.0
"""State that is moved away and back: training goes on bit for bit, and shared memory stays shared.

On a machine without a GPU "away" is another allocation of host memory: what matters is that every tensor follows.
"""

from __future__ import annotations

import gc
import logging
import warnings
from dataclasses import replace

import pytest
import torch

import deepspeed
from deepspeed.runtime.zero import offload_states as moving
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.plan import TierKind

KINDS = list(OffloadStateTypeEnum)
TENSORS = KINDS[:4]


@pytest.fixture
def _everything_moves(monkeypatch):
    monkeypatch.setattr(moving, "_is_away_from", lambda tensor, tier: True)


def make(stage, dtype, gas=1):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": stage},
    }
    if dtype is torch.bfloat16:
        config["bf16"] = {"enabled": True}
    return deepspeed.initialize(model=net, config=config)[0]


def train(engine, dtype, between=lambda optimizer: None, steps=3):
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = engine(torch.randn(2, 7, dtype=dtype)).float().square().sum()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        between(engine.optimizer)
    return losses, {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def addresses(optimizer, kind):
    return {t.untyped_storage().data_ptr() for t in moving.tensors_of(optimizer, kind)}


@pytest.mark.usefixtures("_everything_moves")
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("include", [None, *([kind] for kind in KINDS)])
def test_training_goes_on_bit_for_bit(stage, dtype, include):
    def there_and_back(optimizer):
        before = {kind: addresses(optimizer, kind) for kind in TENSORS}
        moved = moving.offload_states(optimizer, include)
        for kind in TENSORS:
            if before[kind] and kind in (include or KINDS):
                assert kind in moved and not before[kind] & addresses(optimizer, kind)
        moving.reload_states(optimizer)
        assert optimizer.offloaded_states == set()

    engine = make(stage, dtype, gas=2)
    got = train(engine, dtype, there_and_back, steps=5)
    engine.destroy()
    other = make(stage, dtype, gas=2)
    want = train(other, dtype, steps=5)
    other.destroy()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.usefixtures("_everything_moves")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_params_masters_and_slab_go_on_sharing_memory(dtype):
    engine = make(2, dtype)
    train(engine, dtype, steps=1)
    optimizer = engine.optimizer
    (group,) = optimizer.groups
    moving.offload_states(optimizer, [OffloadStateTypeEnum.lp_params])
    address = group.param_slab.flat.untyped_storage().data_ptr()
    pointing = [*group.params, group.own, *(p.low for p in group.parts if p.low is not None)]
    if dtype is torch.float32:
        pointing += [part.master for part in group.parts]
    assert all(t.untyped_storage().data_ptr() == address for t in pointing)
    group.param_slab.flat.fill_(3.0)
    assert all((param == 3.0).all() for param in group.params)
    engine.destroy()


@pytest.mark.usefixtures("_everything_moves")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_points_to_the_old_memory_any_more(stage, dtype):
    engine = make(stage, dtype)
    train(engine, dtype, steps=1)
    held = [
        t.untyped_storage() for kind in TENSORS for t in moving.tensors_of(engine.optimizer, kind)
    ]  # so that no new tensor gets the same address
    old = {storage.data_ptr() for storage in held}
    moving.offload_states(engine.optimizer)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at everything wakes deprecated attributes
        plain = (torch.Tensor, torch.nn.Parameter)  # those that a compiler made have no memory
        tensors = [t for t in gc.get_objects() if type(t) in plain and t.layout is torch.strided]
    assert old
    assert [t.shape for t in tensors if t.untyped_storage().data_ptr() in old] == []
    engine.destroy()


@pytest.mark.parametrize("kind", TENSORS)
def test_devices_are_told(kind):
    engine = make(1, torch.bfloat16)
    train(engine, torch.bfloat16, steps=1)
    got = moving.get_state_devices(engine, kind)
    assert got <= {torch.device("cpu")}
    if kind is not OffloadStateTypeEnum.lp_grads:
        assert got and moving.get_state_devices(engine.optimizer, kind.value) == got
    engine.destroy()


def test_nothing_moves_where_everything_is_in_host_memory_already():
    engine = make(2, torch.bfloat16)
    train(engine, torch.bfloat16, steps=1)
    before = {kind: addresses(engine.optimizer, kind) for kind in TENSORS}
    assert moving.offload_states(engine.optimizer) == set()
    assert before == {kind: addresses(engine.optimizer, kind) for kind in TENSORS}
    moving.reload_states(engine.optimizer)
    engine.destroy()


def test_requests_that_cannot_be_met(caplog):
    engine = make(2, torch.float32)
    with pytest.raises(ValueError, match="CPU memory only"):
        moving.offload_states(engine.optimizer, device=OffloadDeviceEnum.nvme)
    with pytest.raises(ValueError, match="moon"):
        moving.offload_states(engine.optimizer, device="moon")
    with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
        assert moving.offload_states(engine.optimizer, device="none") == set()
    assert "none" in caplog.text
    engine.optimizer.plan = replace(engine.optimizer.plan, param_tier=TierKind.HOST)
    with pytest.raises(AssertionError, match="offloaded parameters"):
        moving.offload_states(engine.optimizer)
    engine.destroy()


def test_the_host_is_told_for_what_is_there_by_configuration(monkeypatch):
    engine = make(3, torch.bfloat16)
    train(engine, torch.bfloat16, steps=1)
    assert engine.optimizer.grad_partitions_flat_buffer.numel() == 0
    monkeypatch.setattr(moving, "_on_device", lambda part, device: False)  # as beside a GPU
    for kind in (OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states):
        assert moving.tensors_of(engine.optimizer, kind) == []
        assert moving.get_state_devices(engine, kind) == {torch.device("cpu")}
    engine.backward(engine(torch.randn(2, 7, dtype=torch.bfloat16)).float().sum())
    assert engine.optimizer.grad_partitions_flat_buffer.count_nonzero() > 0
    engine.destroy()
