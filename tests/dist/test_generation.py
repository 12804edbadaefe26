# SPDX-License-Identifier: Apache-2.0
"""Stage 3 with its hooks taken off for a while and placed again, as trainers do around `generate`."""

from __future__ import annotations

import itertools

import pytest
import torch

import deepspeed

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 6},
}


class Shared(torch.nn.Module):
    """The second layer uses the first one's weight."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.nn.functional.linear(self.first(x), self.first.weight))


def by_handles(engine):
    """What trl does: it reaches into the optimizer by name."""
    offload = engine.optimizer.parameter_offload
    root = offload.module
    named = itertools.chain(root.named_parameters(recurse=True), root.ds_external_parameters())
    with deepspeed.zero.GatheredParameters(engine.parameters()):
        for _, param in named:
            param.ds_active_sub_modules.clear()
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        yield engine.module
        if not offload.param_coordinator.is_invalid_trace():
            offload.param_coordinator._invalidate_trace()
        assert offload.param_coordinator.is_invalid_trace()
        offload._register_deepspeed_module(offload.module)


def by_context(engine):
    with deepspeed.zero.unwrap_model_for_generation(engine) as module:
        yield module


def train(rank, way):
    torch.manual_seed(0)
    engine = deepspeed.initialize(model=Shared(), config=CONFIG)[0]
    seen, hooks = [], []
    for step in range(4):
        loss = engine(torch.full((2, 6), 0.1 * (rank + step))).square().mean()
        engine.backward(loss)
        engine.step()
        seen.append(loss.item())
        hooks.append(sum(len(m._forward_pre_hooks) for m in engine.module.modules()))
        if way is not None:
            with torch.no_grad():
                for module in way(engine):
                    assert not any(m._forward_pre_hooks for m in (module.first, module.head))
                    for _ in range(1 + 2 * rank):  # a rank may call more often than the others
                        assert module(torch.ones(1, 6)).isfinite().all()
    return seen, hooks, [p.numel() for p in engine.module.parameters()]


@pytest.mark.parametrize("way", [by_handles, by_context])
def test_training_goes_on_as_if_nothing_had_been_generated(way, ranks2):
    for plain, between in zip(ranks2.run(train, None), ranks2.run(train, way), strict=True):
        assert between == plain


def whole(rank, stage):
    net = torch.nn.Linear(3, 2)
    config = {**CONFIG, "zero_optimization": {"stage": stage}}
    engine = deepspeed.initialize(model=net, config=config)[0]
    with deepspeed.zero.unwrap_model_for_generation(engine) as module:
        return module is net


def test_below_stage_3_the_module_is_given_as_it_is(ranks2):
    assert ranks2.run(whole, 2) == [True, True]
