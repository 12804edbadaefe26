# SPDX-License-Identifier: Apache-2.0
"""A script's default device, other than the model's, changes nothing: the engine and the ops name their devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.linear import QuantizationConfig
from deepspeed.ops.copies import flatten
from deepspeed.ops.fp_quantizer import FP_Quantize
from deepspeed.ops.norms import squared_norm
from deepspeed.ops.op_builder import QuantizerBuilder

WIDTH = 16


def losses_of(config, folder, elsewhere):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(4, WIDTH)
    losses = []
    # anything made without a device would be on meta, where native code and item() fail
    with torch.device("meta" if elsewhere else "cpu"):
        engine = deepspeed.initialize(model=model, config=config)[0]
        for _ in range(3):
            loss = engine(x.to(next(engine.module.parameters()).dtype)).float().square().mean()
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
        engine.save_checkpoint(str(folder))
        engine.load_checkpoint(str(folder))
        losses.append(engine.get_global_grad_norm().item())
    return losses


@pytest.mark.parametrize("kind", ["Adam", "Lamb", "Lion", "Muon", "OneBitLamb"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_is_the_same(tmp_path, stage, kind):
    if stage and kind in ("Lamb", "OneBitLamb"):
        pytest.skip("norms of whole tensors: stage 0")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": kind, "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": stage > 0},
        "gradient_clipping": 1.0,
    }
    here, there = (losses_of(config, tmp_path / str(e), e) for e in (False, True))
    assert here == there


@pytest.mark.parametrize("zero", ["cpu", "nvme", "zenflow", "super"])
def test_offloaded_training_is_the_same(tmp_path, zero):
    device = "nvme" if zero == "nvme" else "cpu"
    offload = {"device": device, "nvme_path": str(tmp_path), "super_offload": zero == "super"}
    stage = 2 if zero == "zenflow" else 3
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "offload_optimizer": offload},
        "bf16": {"enabled": True},
    }
    if zero == "zenflow":
        config["zero_optimization"]["zenflow"] = {"topk_ratio": 0.5, "update_interval": 2}
    here, there = (losses_of(config, tmp_path / str(e), e) for e in (False, True))
    assert here == there


def test_native_ops_write_to_the_memory_of_their_arguments():
    x = torch.linspace(-3, 3, 512)
    with torch.device("meta"):
        both = torch.empty(1024, device="cpu")
        flatten(both, [x, x])
        assert both.equal(torch.cat([x, x]))
        assert squared_norm(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-12)
        small = FP_Quantize(QuantizationConfig(q_bits=8))
        assert (small.dequantize(small.quantize(x.clone())) - x).abs().max() < 0.2
        op = QuantizerBuilder().load()
        codes, params = op.quantize(x, 4, 8, op.Symmetric)
        back = op.dequantize(codes, params, 4, 8, op.Symmetric)
        assert (back.view(-1) - x).abs().max() < 0.05
