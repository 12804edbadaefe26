# SPDX-License-Identifier: Apache-2.0
"""A frozen base cut over two ranks: the product, the gradients and the training of the whole one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.linear import LoRAConfig, LoRAOptimizedLinear, QuantizationConfig


def layers(rows, quantized):
    quant = QuantizationConfig(group_size=16, q_bits=12) if quantized else None
    options = {"bias": True, "dtype": torch.float32, "quantization_config": quant}
    torch.manual_seed(0)
    cut = LoRAOptimizedLinear(
        8, rows, lora_config=LoRAConfig(lora_r=2, base_weight_sharding=2), **options
    )
    torch.manual_seed(0)
    whole = LoRAOptimizedLinear(8, rows, lora_config=LoRAConfig(lora_r=2), **options)
    whole.load_state_dict(
        {k: v for k, v in cut.state_dict().items() if k != "weight"}, strict=False
    )
    return cut, whole


def products(rank, rows, quantized):
    cut, whole = layers(rows, quantized)
    kept = cut.weight.dequantized() if quantized else cut.weight
    assert tuple(kept.shape) == (-(-rows // 2), 8)
    x = torch.randn(3, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    cut(x).square().sum().backward()
    whole(y).square().sum().backward()
    cut.load_state_dict({"weight": torch.arange(8.0 * rows).view(rows, 8)}, strict=False)
    return cut(x).shape, x.grad, y.grad, cut.full_weight()


@pytest.mark.parametrize("rows", [6, 5])
@pytest.mark.parametrize("quantized", [False, True])
def test_cut_base_multiplies_like_the_whole_one(ranks2, rows, quantized):
    for shape, got, want, loaded in ranks2.run(products, rows, quantized):
        assert shape == (3, rows)
        # Groups of a cut base differ from those of the whole one: 12 bits, 2**-8 of the largest weight.
        room = {"rtol": 0.02, "atol": 0.02} if quantized else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(got, want, **room)
        expected = torch.arange(8.0 * rows).view(rows, 8)
        torch.testing.assert_close(
            loaded, expected, rtol=2**-7 if quantized else 0, atol=0.05 * quantized
        )


def train(rank, stage):
    torch.manual_seed(0)
    net = nn.Sequential(
        LoRAOptimizedLinear(
            8, 6, lora_config=LoRAConfig(lora_r=2, base_weight_sharding=2), dtype=torch.float32
        )
    )
    before = net[0].full_weight().clone()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=net, config=config)
    torch.manual_seed(rank)
    for _ in range(3):
        engine.backward(engine(torch.randn(2, 8)).square().sum())
        engine.step()
    after = net[0].full_weight()
    assert torch.equal(before, after), "the base must stay"
    adapters = [p.detach().clone() for p in net.parameters() if p.requires_grad]
    engine.destroy()
    return adapters, after


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_initialize_leaves_each_rank_its_part_of_the_base(ranks2, stage):
    (first, base), (second, same) = ranks2.run(train, stage)
    assert torch.equal(base, same)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[1].abs().max() > 0
