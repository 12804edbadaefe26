# SPDX-License-Identifier: Apache-2.0
"""What stays whole on one rank, where a slice is all of a parameter."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.prefetch import Record

NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def make(quantized=False, optimizer=True):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu"},
            **NOTHING_STAYS,
        },
    }
    if optimizer:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.0}}
    if quantized:
        groups = {"num_bits": 8, "group_size": 2, "group_dim": 1, "symmetric": False}
        config["weight_quantization"] = {"quantized_initialization": groups}
    return deepspeed.initialize(model=net, config=config)[0]


def status(engine):
    return [p.ds_status for p in engine.module.parameters()]


X = torch.linspace(-1, 1, 16).view(2, 8)


def test_a_slice_that_is_all_of_a_parameter_is_pointed_at_and_stays():
    engine = make(optimizer=False)
    with torch.no_grad():
        first = engine(X)
        second = engine(X)
    assert torch.equal(first, second)
    for param in engine.module.parameters():
        assert param.ds_status is ZeroParamStatus.AVAILABLE
        assert param.data_ptr() == param.ds_tensor.data_ptr()
    engine.empty_partition_cache()
    assert status(engine) == [ZeroParamStatus.NOT_AVAILABLE] * 4
    with torch.no_grad():
        assert torch.equal(engine(X), first)


def test_encoded_parameters_are_let_go_and_the_others_stay():
    engine = make(quantized=True, optimizer=False)
    with torch.no_grad():
        outs = [engine(X) for _ in range(3)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    gone, here = ZeroParamStatus.NOT_AVAILABLE, ZeroParamStatus.AVAILABLE
    assert status(engine) == [gone, here, gone, here]


@pytest.mark.parametrize("look", [False, True], ids=["training only", "evaluation in between"])
def test_steps_show_in_what_stays(look):
    engine = make()
    plain = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        plain.load_state_dict(engine.module.state_dict())
    adam = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.0)
    for step in range(4):
        if look:
            with torch.no_grad():
                torch.testing.assert_close(engine(X), plain(X), rtol=1e-5, atol=1e-6)
        loss, want = engine(X + step).square().sum(), plain(X + step).square().sum()
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        engine.backward(loss)
        engine.step()
        want.backward()
        adam.step()
        adam.zero_grad()


def test_a_distance_of_zero_keeps_nothing_for_its_next_use():
    record, param = Record(), object()
    record.begin()
    for step in (0, 0):
        record.visit(step)
    record.end(lambda _: 10)
    record.begin()
    record.visit(0)
    assert [record.soon(param, lambda _: [param], most) for most in (0, 1)] == [False, True]


def test_what_stays_on_one_rank_says_so():
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 3, **NOTHING_STAYS},
    }
    engine = deepspeed.initialize(model=torch.nn.Linear(8, 6), config=config)[0]
    assert all(p.ds_persist for p in engine.module.parameters())


class Wrapper(torch.nn.Module):
    def __init__(self, inner, extra):
        super().__init__()
        self.inner, self.extra = inner, extra

    def forward(self, x):
        return self.inner(x) + self.extra(x)


def test_a_module_attached_later_is_gathered_and_what_it_wraps_only_once():
    engine = make()
    first = engine(X)
    with deepspeed.zero.Init(dtype=torch.float32):
        extra = torch.nn.Linear(6, 4)
    with deepspeed.zero.GatheredParameters(list(extra.parameters()), modifier_rank=0):
        torch.nn.init.constant_(extra.weight, 0.5)
        torch.nn.init.zeros_(extra.bias)
    hooks = len(engine.module[2]._forward_hooks)
    engine.module[2] = Wrapper(engine.module[2], extra)
    assert len(engine.module[2].inner._forward_hooks) == hooks
    assert extra.weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    for _ in range(2):
        inner = torch.tanh(engine.module[0](X))
        out = engine(X)
        torch.testing.assert_close(out, first + 0.5 * inner.sum(1, keepdim=True))
        engine.backward(out.sum())
        assert extra.weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    engine.destroy()
    engine.module.late = torch.nn.Linear(4, 4)
    assert not engine.module.late._forward_hooks
