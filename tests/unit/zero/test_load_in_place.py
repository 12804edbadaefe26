# SPDX-License-Identifier: Apache-2.0
"""Loading fills the memory that optimizer states have, and leaves nothing of before in it."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.checkpoint.reshard import from_shards
from deepspeed.runtime.zero import load_state, state
from deepspeed.utils import safe_get_full_optimizer_state

KEYS = ("exp_avg", "exp_avg_sq")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = torch.nn.Parameter(torch.randn(9))  # a shard's size is even
        self.even = torch.nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (self.odd * x).sum() + (self.even**2).sum()


def trained(*groups: tuple[str, ...], steps: int = 1, kind: str = "AdamW"):
    torch.manual_seed(0)
    model = Model()
    params = [{"params": [getattr(model, name) for name in group]} for group in groups]
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    config["zero_allow_untested_optimizer"] = True
    config["optimizer"] = {"type": kind, "params": {"lr": 0.1, "torch_adam": kind == "Adam"}}
    made = deepspeed.initialize(model=model, model_parameters=params, config=config)[0]
    for _ in range(steps):
        made.backward(made(torch.arange(1.0, 10.0)))
        made.step()
    return made


def states(engine):
    named = engine.module.named_parameters()
    return {(n, k): safe_get_full_optimizer_state(p, k).clone() for n, p in named for k in KEYS}


def load(into, saved):
    content = saved.optimizer.state_dict()
    shapes = state.param_shapes(saved.optimizer)
    load_state.load_state_dict(into.optimizer, from_shards(lambda rank: content, shapes))


def inner_states(engine):
    return list(engine.optimizer.optimizer.state.values())


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("groups", [[("odd", "even")], [("odd",), ("even",)]], ids=["one", "two"])
def test_states_are_those_saved_and_padding_is_zero(kind, steps, groups):
    saved, into = trained(("odd", "even"), kind=kind), trained(*groups, steps=steps, kind=kind)
    want = states(saved)
    before = [{k: s[k].data_ptr() for k in KEYS} for s in inner_states(into)]
    for values in inner_states(into):  # as another padding would have left it
        for key in KEYS:
            values[key].fill_(7.0)
    load(into, saved)
    for key, value in states(into).items():
        assert torch.equal(value, want[key]), key
    for values, group in zip(inner_states(into), into.optimizer.groups, strict=True):
        assert not steps or {k: values[k].data_ptr() for k in KEYS} in before
        assert not values["exp_avg"][len(values["exp_avg"]) - group.padding :].any()


def test_states_in_another_dtype_get_memory_of_their_own():
    saved, into = trained(("odd", "even")), trained(("odd", "even"), steps=2)
    (values,) = inner_states(into)
    for key in KEYS:
        values[key] = values[key].double()
    load(into, saved)
    assert [v[key].dtype for v in inner_states(into) for key in KEYS] == [torch.float32] * 2
    for key, value in states(into).items():
        assert torch.equal(value, states(saved)[key]), key
