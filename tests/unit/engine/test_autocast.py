# SPDX-License-Identifier: Apache-2.0
"""`torch_autocast`: which gradients travel in autocast's dtype, and that fp16 scales its loss."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.comm import flat
from deepspeed.runtime.torch_autocast import get_comm_dtype, has_comm_dtype
from deepspeed.runtime.zero.buckets import cut_buckets
from tests.helpers.parity import batch, loss_of, model


class Special(torch.nn.Linear):
    """A subclass of a safe class is not safe."""


def net_of():
    return torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), Special(4, 4), torch.nn.Linear(4, 2)
    )


def start(stage, net, **autocast):
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "torch_autocast": {"enabled": True, **autocast},
    }
    return deepspeed.initialize(model=net, config=config)[0]


@pytest.mark.parametrize(
    ("names", "marked"),
    [
        ({}, {"0", "3"}),
        ({"lower_precision_safe_modules": ["torch.nn.LayerNorm"]}, {"1"}),
        ({"lower_precision_safe_modules": []}, set()),
    ],
)
def test_params_of_safe_modules_are_marked(names, marked):
    engine = start(1, net_of(), dtype="bfloat16", **names)
    params = dict(engine.module.named_parameters())
    assert {name[0] for name, p in params.items() if has_comm_dtype(p)} == marked
    for param in params.values():
        want = torch.bfloat16 if has_comm_dtype(param) else torch.float32
        assert get_comm_dtype(param) is want


def test_marks_of_an_earlier_engine_are_taken_off():
    net = net_of()
    start(1, net, dtype="bfloat16").destroy()
    engine = start(1, net, enabled=False)
    assert not any(has_comm_dtype(param) for param in engine.module.parameters())
    buckets = [b for group in engine.optimizer.groups for b in cut_buckets(group, engine.plan)]
    assert {bucket.wire_dtype for bucket in buckets} == {torch.float32}


def test_a_class_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="torch.nn.Nothing"):
        start(0, net_of(), lower_precision_safe_modules=["torch.nn.Nothing"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_bucket_has_gradients_of_two_wire_dtypes(stage):
    engine = start(stage, net_of(), dtype="bfloat16")
    (group,) = engine.optimizer.groups
    buckets = cut_buckets(group, engine.plan)
    found = [([i // 2 for i in b.indices], b.wire_dtype) for b in buckets]
    # weight and bias of each layer, last layers first
    low, full = torch.bfloat16, torch.float32
    assert found == [([3, 3], low), ([1, 1, 2, 2], full), ([0, 0], low)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_scales_the_loss_and_skips_what_overflows(stage):
    engine = start(stage, model(), dtype="float16")
    x, y = batch(0, 0, 0, torch.float32)
    loss = loss_of(engine, x, y)
    assert engine.scale(loss) == loss * 2.0**16
    before = [p.detach().clone() for p in engine.module.parameters()]
    engine.backward(loss_of(engine, x, y) * float("inf"))
    engine.step()
    assert not engine.was_step_applied() and engine.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))


@pytest.mark.parametrize("reduces_itself", [True, False])
def test_an_overflow_on_another_rank_counts_where_gradients_are_each_ranks_own(
    monkeypatch, reduces_itself
):
    engine = start(0, model(), dtype="float16")
    engine.basic_optimizer.reduces_itself = reduces_itself
    engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)))

    def other_rank_overflowed(tensor, axis, op="sum"):
        if op == "max" and axis is engine.mesh.sequence_data and tensor.dtype == torch.float32:
            tensor.fill_(1.0)

    monkeypatch.setattr(flat, "all_reduce_", other_rank_overflowed)
    engine.step()
    assert engine.was_step_applied() is not reduces_itself
