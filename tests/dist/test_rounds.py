# SPDX-License-Identifier: Apache-2.0
"""Gradients that are reduced more than once before a step, passes that raise, and parameters that a module hands to its caller."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deepspeed


def start(net, stage, **extra):
    zero = {"stage": stage, "reduce_bucket_size": 1, "stage3_param_persistence_threshold": 0}
    cfg = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        **extra,
    }
    return deepspeed.initialize(model=net, config=cfg)[0]


def reduced_twice(rank, stage, op, bf16):
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    engine = start(net, stage, gradient_allreduce_op=op, bf16={"enabled": bf16})
    dtype = torch.bfloat16 if bf16 else torch.float32
    for share in (1.0, 2.0):
        engine.set_gradient_accumulation_boundary(True)
        x = torch.full((1, 2), share * (rank + 1), dtype=dtype)
        engine.backward(engine(x).sum())
    engine.allreduce_gradients()
    engine.step()
    return net.weight.detach().float()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("op", "want"), [("mean", 1 - 4.5), ("sum", 1 - 9.0)])
def test_what_was_reduced_before_counts_once(op, want, bf16, ranks2):
    for weight in ranks2.run(reduced_twice, 0, op, bf16):
        torch.testing.assert_close(weight, torch.full((1, 2), want))


class Again(torch.nn.Module):
    """Rank 1 goes through the first layer twice, so its gradient comes in two instalments there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, rank, reentrant=True):
        for index in (0, 1, 2, 0)[: 3 + rank]:
            layer = self.layers[index]
            if reentrant:
                x = checkpoint(lambda v, f=layer: torch.tanh(f(v)), x, use_reentrant=True)
            else:
                x = torch.tanh(layer(x))
        return x


def late_on_one_rank(rank, stage):
    engine = start(Again(), stage)
    for step in range(2):
        x = torch.full((1, 4), 0.1 * (1 + rank + step), requires_grad=True)
        engine.backward(engine(x, rank).square().sum())
        engine.step()
    return [p.detach().clone() for p in engine.module.parameters()]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_may_come_late_on_one_rank_only(stage, ranks2):
    net = Again()
    sgd = torch.optim.SGD(net.parameters(), lr=1.0)
    for step in range(2):
        sgd.zero_grad()
        for rank in range(2):
            x = torch.full((1, 4), 0.1 * (1 + rank + step))
            (net(x, rank, reentrant=False).square().sum() / 2).backward()
        sgd.step()
    for got in ranks2.run(late_on_one_rank, stage, timeout=60):
        for a, b in zip(got, net.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=2e-6)


class GivesItsBias(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x), self.bias


class Passes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = GivesItsBias(4, 4)

    def forward(self, x):
        return self.inner(x)


class Uses(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.passes = Passes()

    def forward(self, x):
        out, bias = self.passes(x)
        return (out * bias).sum()


def uses_a_returned_param(rank):
    net = Uses()
    want = copy.deepcopy(net)
    for each in range(2):
        (want(torch.full((2, 4), 1.0 + each)) / 2).backward()
    engine = start(net, 3)
    engine.backward(engine(torch.full((2, 4), 1.0 + rank)))
    known = [len(m._external_params) for m in (net, net.passes, net.passes.inner)]
    engine.step()
    with deepspeed.zero.GatheredParameters(list(net.parameters())), torch.no_grad():
        gaps = [
            (p.cpu() - (q - q.grad)).abs().max().item()
            for p, q in zip(net.parameters(), want.parameters(), strict=True)
        ]
    return known, max(gaps)


def test_a_module_may_return_its_parameter(ranks2):
    for known, gap in ranks2.run(uses_a_returned_param):
        assert known == [1, 0, 0]
        assert gap < 1e-5  # fp32, numbers of about one


def goes_on(rank):
    """Weights after a step, by stage: (alone, after a backward pass that raised when buckets were on their way)."""

    def fail(_):
        raise KeyError("not this time")

    found = {}
    for stage in (0, 1, 2, 3):
        for broken in (False, True):
            torch.manual_seed(5)
            net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)))
            zero = {"stage": stage, "reduce_bucket_size": 1, "overlap_comm": True}
            engine = start(net, stage, zero_optimization=zero)
            x = torch.full((1, 4), rank + 1.0, requires_grad=True)
            if broken:
                hidden = engine.module[0](x * 3)
                hidden.register_hook(fail)
                with pytest.raises(KeyError, match="not this time"):
                    engine.backward(net[1:](hidden).square().sum())
                engine.zero_grad()
            engine.backward(engine(x).square().sum())
            engine.step()
            with deepspeed.zero.GatheredParameters(list(net.parameters())):
                found[stage, broken] = [p.detach().clone() for p in net.parameters()]
            engine.destroy()
    return found


def test_training_goes_on_after_a_backward_pass_that_raised(ranks2):
    for found in ranks2.run(goes_on):
        for stage in (0, 1, 2, 3):
            for want, got in zip(found[stage, False], found[stage, True], strict=True):
                assert torch.equal(want, got)


def frozen_in_mid_run(rank):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    engine = start(net, 0, optimizer={"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5}})
    weights = []
    for frozen in (False, True):
        net[0].requires_grad_(not frozen)
        engine.backward(engine(torch.ones(1, 2)).sum())
        engine.step()
        weights.append(net[0].weight.detach().clone())
    return weights


def test_what_is_frozen_in_mid_run_does_not_decay_at_stage_0(ranks2):
    for before, after in ranks2.run(frozen_in_mid_run):
        assert torch.equal(before, after)


def gradients_of_one_element(rank):
    """The second rank's shard of such a group is padding, in one part or in two."""
    found = []
    for stage in (1, 2):
        for section in ({}, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}):
            net = torch.nn.Linear(1, 1, bias=False)
            zero = {"stage": stage, **section}
            adam = {"type": "AdamW", "params": {"lr": 0.1}}
            engine = start(net, stage, zero_optimization=zero, optimizer=adam)
            engine.backward(engine(torch.full((1, 1), rank + 1.0)).sum())
            found.append(deepspeed.utils.safe_get_full_grad(net.weight))
            deepspeed.utils.safe_set_full_grad(net.weight, found[-1] * 2)
            found.append(deepspeed.utils.safe_get_full_grad(net.weight) / 2)
            engine.step()
            engine.destroy()
    return found


def test_gradients_are_told_on_ranks_that_hold_nothing_of_them(ranks2):
    for found in ranks2.run(gradients_of_one_element):
        assert [grad.item() for grad in found] == [1.5] * 8
