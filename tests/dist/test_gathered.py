# SPDX-License-Identifier: Apache-2.0
"""Misuse of gathered parameters: an error that says what is wrong, on all ranks and at once, or the stated discard."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.runtime.zero import GatheredParameters

X = torch.full((2, 7), 0.5)


def start(zero=None, net=None, **extra):
    torch.manual_seed(0)
    net = net or torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            **(zero or {}),
        },
        **extra,
    }
    return deepspeed.initialize(model=net, config=config)[0]


def whole(param):
    with GatheredParameters(param):
        return param.detach().clone()


def goes_on(engine):
    """Training works after the mistake; returns the newest weights."""
    dtype = engine.module[0].weight.dtype
    engine.backward(engine(X.to(dtype)).float().square().sum())
    engine.step()
    return whole(engine.module[0].weight)


def messages_of(rank, mistakes):
    """What is said of each mistake, and whether training goes on."""
    said = {}
    for name in mistakes:
        engine = start({"enable_sanity_checks": name.startswith("checked")})
        weight = engine.module[0].weight
        before = whole(weight)
        said[name] = None
        try:
            MISTAKES[name](rank, weight)
        except RuntimeError as error:
            said[name] = str(error)
        assert torch.equal(whole(weight), before), name
        assert torch.isfinite(goes_on(engine)).all()
        engine.destroy()
    return said


def edit_in_place(rank, weight):
    with GatheredParameters(weight), torch.no_grad():
        weight.add_(1.0)


def edit_data_of_one_rank(rank, weight):
    with GatheredParameters([weight]):
        if rank == 1:
            weight.data[0, 0] = 5.0


def read_and_put_back(rank, weight):
    with GatheredParameters(weight), torch.no_grad():
        weight.mul_(2.0)
        weight.div_(2.0)


def another_shape(rank, weight):
    with GatheredParameters(weight, modifier_rank=0):
        if rank == 0:
            weight.data = torch.zeros(6, 7)


def another_dtype(rank, weight):
    with GatheredParameters(weight, modifier_rank=0):
        if rank == 0:
            weight.data = weight.data.double()


def overlap(rank, weight):
    with GatheredParameters(weight, modifier_rank=0), GatheredParameters([weight]):
        pass


def assigned_outside(rank, weight):
    weight.data = torch.ones(5, 7)
    try:
        with GatheredParameters(weight):
            pass
    finally:
        weight.data = torch.empty(0)


MISTAKES = {
    "edit": edit_in_place,
    "checked edit": edit_in_place,
    "checked edit of one rank": edit_data_of_one_rank,
    "checked edit that is taken back": read_and_put_back,
    "another shape": another_shape,
    "another dtype": another_dtype,
    "overlap": overlap,
    "assigned outside": assigned_outside,
}


def check_messages(said):
    assert said["edit"] is None
    assert "in-place modification" in said["checked edit that is taken back"]
    assert (
        "modifier_rank" in said["checked edit"]
        and "modifier_rank" in said["checked edit of one rank"]
    )
    assert "another shape or dtype" in said["another shape"]
    assert "another shape or dtype" in said["another dtype"]
    assert "overlapping" in said["overlap"]
    assert "only its slice" in said["assigned outside"]


def test_every_rank_is_told_and_training_goes_on(ranks2):
    one, two = ranks2.run(messages_of, list(MISTAKES))
    check_messages(one)
    check_messages(two)
    assert "float64" in one["another dtype"] and "(6, 7)" in one["another shape"]
    assert (
        "another rank" in two["another dtype"] and "another rank" in one["checked edit of one rank"]
    )


@pytest.mark.parametrize("extra", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_one_rank_drops_the_edit_or_says_that_it_stays(extra, caplog, monkeypatch):
    from deepspeed.runtime.zero import gathered

    monkeypatch.setattr(gathered, "_warned", False)
    monkeypatch.setattr(deepspeed.utils.logger, "propagate", True)
    engine = start(**extra)
    weight = engine.module[0].weight
    before = whole(weight)
    for _ in range(2):
        edit_in_place(0, weight)
    ours = {r.getMessage() for r in caplog.records if r.name == deepspeed.utils.logger.name}
    if extra:  # there is a master weight, which the edit has not reached
        assert torch.equal(whole(weight), before) and not ours
    else:
        assert torch.equal(whole(weight), before + 1.0 + 1.0)
        (message,) = ours
        assert "modifier_rank=0" in message


def test_one_rank_with_checks():
    said = messages_of(
        0, [name for name in MISTAKES if name not in ("edit", "checked edit of one rank")]
    )
    check_messages({**said, "edit": None, "checked edit of one rank": "modifier_rank"})


class UsesAnothers(torch.nn.Module):
    """Its forward pass needs the first layer's weight, which it keeps where nobody looks for parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(7, 7, bias=False), torch.nn.Linear(7, 3)
        self.borrowed = [self.first.weight]

    def forward(self, x):
        x = self.first(x)
        weight = self.borrowed[0]
        return self.last(torch.nn.functional.linear(x, weight))


def borrows(rank):
    zero = {
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
    }
    engine = start(zero, UsesAnothers())
    try:
        engine(X)
    except RuntimeError as error:
        said = str(error)
    deepspeed.zero.register_external_parameter(engine.module, engine.module.first.weight)
    out = engine(X)
    engine.backward(out.sum())
    engine.step()
    try:
        nested = torch.nn.Sequential(torch.nn.Sequential(torch.nn.LayerNorm(7)))
        start(zero, nested)(X.double())
    except RuntimeError as error:
        other = str(error)
    return said, other, out.shape


def test_a_parameter_that_nobody_gathers_is_named(ranks2):
    for said, other, shape in ranks2.run(borrows):
        assert "slice" not in other, "released on the error's way out, whole where it was used"
        assert "'weight' of shape (7, 7)" in said and "self.borrowed[0]" in said
        assert "register_external_parameter" in said and shape == (2, 3)
