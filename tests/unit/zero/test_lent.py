# SPDX-License-Identifier: Apache-2.0
"""Optimizer states that stay in the memory of a checkpoint."""

from __future__ import annotations

import torch

import deepspeed
from deepspeed.checkpoint import whole_file
from deepspeed.checkpoint.reshard import from_shards
from deepspeed.runtime.zero import state
from deepspeed.utils import safe_get_full_optimizer_state

KEYS = ("exp_avg", "exp_avg_sq")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = torch.nn.Parameter(torch.randn(9))  # a shard's size is even
        self.even = torch.nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (self.odd * x).sum() + (self.even**2).sum()


def engine(*groups: tuple[str, ...]):
    torch.manual_seed(0)
    model = Model()
    params = [{"params": [getattr(model, name) for name in group]} for group in groups]
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.1}}
    return deepspeed.initialize(model=model, model_parameters=params, config=config)[0]


def states(engine):
    named = engine.module.named_parameters()
    return {(n, k): safe_get_full_optimizer_state(p, k).clone() for n, p in named for k in KEYS}


def loaded(into, saved, monkeypatch):
    monkeypatch.setattr(whole_file, "OWN_BLOCK", 1)
    shapes = state.param_shapes(saved.optimizer)
    content = saved.optimizer.state_dict()
    state.load_state_dict(
        into.optimizer, from_shards(lambda rank: content, shapes, is_lent=lambda rank: True)
    )
    kept = content["base_optimizer_state"]["state"].values()
    there = {values["exp_avg"].data_ptr() for values in kept}
    return [v["exp_avg"].data_ptr() in there for v in into.optimizer.optimizer.state.values()]


def trained(*groups: tuple[str, ...]):
    made = engine(*groups)
    made.backward(made(torch.arange(1.0, 10.0)))
    made.step()
    return made


def test_states_stay_in_the_memory_they_were_read_into(monkeypatch):
    saved, into = trained(("odd", "even")), engine(("odd", "even"))
    want = states(saved)
    assert loaded(into, saved, monkeypatch) == [True]
    for key, value in states(into).items():
        assert torch.equal(value, want[key]), key


def test_padding_never_reaches_into_the_states_of_another_parameter(monkeypatch):
    saved, into = trained(("odd", "even")), engine(("odd",), ("even",))
    want = states(saved)
    loaded(into, saved, monkeypatch)
    for key, value in states(into).items():
        assert torch.equal(value, want[key]), key
    flats = [values["exp_avg"] for values in into.optimizer.optimizer.state.values()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in flats)
    assert spans[0][1] <= spans[1][0], "two parts share memory"
