# SPDX-License-Identifier: Apache-2.0
"""The hybrid engine and adapters that the caller has folded in."""

from __future__ import annotations

import torch

import deepspeed


class Lora(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4))
        self.lora_right_weight = torch.nn.Parameter(torch.randn(4, 2))
        self.lora_left_weight = torch.nn.Parameter(torch.randn(2, 4))
        self.lora_scaling, self.fuse_lora = 0.5, False


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Lora(), Lora()

    def generate(self):
        return [layer.weight.detach().clone() for layer in (self.first, self.second)]


def test_generation_leaves_a_layer_alone_whose_adapter_is_folded_in_already():
    model = Model()
    model.first.fuse_lora = True
    before = [model.first.weight.detach().clone(), model.second.weight.detach().clone()]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "hybrid_engine": {"enabled": True},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    first, second = engine.generate()
    assert torch.equal(first, before[0]) and not torch.equal(second, before[1])
    assert model.first.fuse_lora and not model.second.fuse_lora
    assert torch.equal(model.second.weight, before[1])
    engine.destroy()
