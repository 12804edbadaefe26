# SPDX-License-Identifier: Apache-2.0
"""Wrong requests: each gets one clear error."""

from __future__ import annotations

import argparse

import pytest
import torch

import deepspeed
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from tests.helpers.parity import batch, loss_of, model

BASE = {"train_micro_batch_size_per_gpu": 3, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}


def start(net=None, config=BASE, **arguments):
    return deepspeed.initialize(model=model() if net is None else net, config=config, **arguments)


def test_no_model():
    with pytest.raises(AssertionError, match="requires a model"):
        deepspeed.initialize(config=BASE)


def test_no_configuration():
    with pytest.raises(AssertionError, match="--deepspeed_config"):
        deepspeed.initialize(model=model())


def test_two_configurations(tmp_path):
    with pytest.raises(AssertionError, match="two configurations"):
        start(args=argparse.Namespace(deepspeed_config=str(tmp_path / "ds.json")))


def test_an_unknown_optimizer_is_named_with_what_there_is():
    with pytest.raises(AssertionError, match="Adm.*adamw"):
        start(config={**BASE, "optimizer": {"type": "Adm"}})


def test_an_unknown_optimizer_parameter_is_named():
    with pytest.raises(ValueError, match=r"learning_rate.*lr"):
        start(config={**BASE, "optimizer": {"type": "Adam", "params": {"learning_rate": 1}}})


def test_max_grad_norm_points_to_gradient_clipping():
    with pytest.raises(ValueError, match="gradient_clipping"):
        start(config={**BASE, "optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}})


def test_an_unknown_scheduler_is_named_with_what_there_is():
    with pytest.raises(AssertionError, match="WarmLR.*WarmupLR"):
        start(config={**BASE, "scheduler": {"type": "WarmLR", "params": {}}})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_nothing_to_train(stage):
    net = model().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        start(net, config={**BASE, "zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_optimizer_for_another_model(stage):
    stray = torch.optim.Adam(model().parameters())
    config = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": stage}}
    with pytest.raises(ValueError, match="not the model's"):
        start(optimizer=stray, config=config)


@pytest.mark.parametrize("stage", [1, 2])
def test_sharding_without_an_optimizer(stage):
    with pytest.raises(AssertionError, match="no optimizer"):
        start(config={"train_batch_size": 1, "zero_optimization": {"stage": stage}})


def test_an_optimizer_that_zero_is_not_known_to_serve():
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1}},
        "zero_optimization": {"stage": 1},
    }
    with pytest.raises(AssertionError, match="zero_allow_untested_optimizer"):
        start(config=config)
    start(config={**config, "zero_allow_untested_optimizer": True})


def test_a_device_optimizer_over_offloaded_states():
    net = model()
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    with pytest.raises(ZeRORuntimeException, match="DeepSpeedCPUAdam"):
        start(net, config=config, optimizer=torch.optim.AdamW(net.parameters()))


def test_a_scheduler_object_without_its_optimizer(monkeypatch):
    class Older(torch.optim.lr_scheduler._LRScheduler):
        def get_lr(self):
            return self.base_lrs

    net = model()
    other = torch.optim.SGD(net.parameters(), lr=1)
    with pytest.raises(AssertionError, match="scheduler object"):
        start(net, lr_scheduler=Older(other))
    seen = []
    monkeypatch.setattr("deepspeed.runtime.build_checks.logger.warning", seen.append)
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
    assert start(net, lr_scheduler=scheduler)[3] is scheduler
    assert "scheduler object" in seen[0]


def test_losses_that_cannot_be_propagated():
    engine, *_ = start()
    out = engine(batch(0, 0, 0, torch.float32)[0])
    with pytest.raises(AssertionError, match="scalar tensor"):
        engine.backward(out)
    with pytest.raises(AssertionError, match="as a tensor"):
        engine.backward(1.0)
    with pytest.raises(AssertionError, match="trainable parameter"):
        engine.backward(out.detach().sum())


def test_closures():
    engine, *_ = start(config={**BASE, "zero_optimization": {"stage": 1}})
    with pytest.raises(RuntimeError, match="closure"):
        engine.optimizer.step(lambda: None)


def test_a_local_rank_that_contradicts_the_environment():
    deepspeed.init_distributed()
    with pytest.raises(AssertionError, match="disagree"):
        start(args=argparse.Namespace(local_rank=7, deepspeed_config=None))


def test_a_missing_local_rank(monkeypatch):
    deepspeed.init_distributed()
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    with pytest.raises(AssertionError, match="LOCAL_RANK"):
        start(dist_init_required=False)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"amp": {"enabled": True}}, "amp.enabled"),
        ({"nebula": {"enabled": True}}, "nebula"),
    ],
)
def test_what_is_not_built_is_named(section, key):
    with pytest.raises(deepspeed.DeepSpeedConfigError, match=key):
        start(config={**BASE, **section})


def test_the_first_step_counts_after_a_refused_one():
    engine, *_ = start()
    engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)))
    engine.step()
    assert engine.global_steps == 1


def test_what_cannot_fit_is_refused_with_the_table_before_anything_is_allocated(monkeypatch):
    import psutil

    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=10_000))
    with pytest.raises(MemoryError, match=r"(?s)does not fit.*optimizer.*at most"):
        start(torch.nn.Linear(1000, 100))


def test_wide_states_where_narrow_ones_are_configured():
    net = torch.nn.Linear(4, 4)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {
            "enabled": True,
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
        },
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    }
    wide = deepspeed.ops.adam.DeepSpeedCPUAdam(net.parameters())
    with pytest.raises(AssertionError, match="fp32_optimizer_states=False"):
        deepspeed.initialize(model=net, optimizer=wide, config=config)
    narrow = deepspeed.ops.adam.DeepSpeedCPUAdam(net.parameters(), fp32_optimizer_states=False)
    deepspeed.initialize(model=net, optimizer=narrow, config=config)
