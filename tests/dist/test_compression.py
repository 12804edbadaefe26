# SPDX-License-Identifier: Apache-2.0
"""Compression on two ranks: sharded weights, blocks pruned alike, tensor-parallel layers."""

from __future__ import annotations

import copy

import torch
from torch import nn

import deepspeed
from deepspeed.compression import init_compression
from deepspeed.compression.basic_layer import (
    ColumnParallelLinear_Compress,
    RowParallelLinear_Compress,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return (self.down(torch.relu(self.up(x))) - x).square().mean()


def _config(stage, **techniques):
    return {
        "train_batch_size": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "compression_training": techniques,
    }


def _quantized_and_pruned():
    params = {"start_bits": 8, "target_bits": 8}
    return {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, "quantize_weight_in_forward": True},
            "different_groups": {"a": {"params": params, "modules": ["up", "down"]}},
        },
        "row_pruning": {
            "shared_parameters": {"enabled": True, "method": "topk", "schedule_offset": 1},
            "different_groups": {"a": {"params": {"dense_ratio": 0.5}, "modules": ["up"]}},
        },
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": "l1", "schedule_offset": 2},
            "different_groups": {"a": {"params": {"dense_ratio": 0.5}, "modules": ["down"]}},
        },
    }


def _blocks():
    shared = {"enabled": True, "method": "snip_momentum", "schedule_offset": 1}
    shared |= {"schedule_offset_end": 3, "dense_ratio": 0.5}
    return {"sparse_pruning": {"shared_parameters": shared}}


def _losses(rank, model, config):
    engine, *_ = deepspeed.initialize(model=model, config=config)
    data, losses = torch.Generator().manual_seed(1), []
    for _ in range(4):
        loss = engine(torch.randn(4, 8, generator=data)[2 * rank : 2 * rank + 2])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / 2)
    engine.destroy()
    return losses


class _Groups:
    get_model_parallel_group = staticmethod(lambda: torch.distributed.group.WORLD)


def _parallel(rank):
    torch.manual_seed(0)
    plain, x = Net(), torch.randn(3, 8, requires_grad=True)
    expected = plain.down(torch.relu(plain.up(x)))
    expected.square().sum().backward()
    column = ColumnParallelLinear_Compress(_Groups, 8, 16, gather_output=False)
    row = RowParallelLinear_Compress(_Groups, 16, 8, input_is_parallel=True)
    half = slice(8 * rank, 8 * rank + 8)
    for layer, weight, bias in (
        (column, plain.up.weight[half], plain.up.bias[half]),
        (row, plain.down.weight[:, half], plain.down.bias),
    ):
        layer.weight.data.copy_(weight.detach())
        layer.bias.data.copy_(bias.detach())
    own = x.detach().clone().requires_grad_()
    found = row(torch.relu(column(own)[0]))[0]
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own.grad, x.grad)
    torch.testing.assert_close(column.weight.grad, plain.up.weight.grad[half])
    torch.testing.assert_close(row.weight.grad, plain.down.weight.grad[:, half])
    row.input_is_parallel, column.gather_output, column.skip_bias_add = False, True, True
    out, bias = column(own)
    assert out.shape == (3, 16) and torch.equal(bias, column.bias)
    torch.testing.assert_close(row(torch.relu(plain.up(own)))[0], expected)
    model = nn.ModuleDict({"up": _Column(column.weight, column.bias)})
    asked = _config(0, weight_quantization=_quantized_and_pruned()["weight_quantization"])
    made = init_compression(model, asked, mpu=_Groups)["up"]
    copied = copy.deepcopy(made)
    assert type(copied) is ColumnParallelLinear_Compress and copied.out_features == 8
    column.skip_bias_add = False
    assert torch.equal(made(own)[0], column(own)[0])


class _Column(nn.Module):
    """What Megatron's layers have of attributes."""

    gather_output = True

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias


_Groups.ColumnParallelLinear = _Column


def _all(rank):
    deepspeed.init_distributed("gloo")
    found = {}
    torch.manual_seed(0)
    plain = Net()
    torch.manual_seed(5)
    prepared = init_compression(copy.deepcopy(plain), _config(0, **_quantized_and_pruned()))
    for stage in (0, 2, 3):
        config = _config(stage, **_quantized_and_pruned())
        found[stage] = _losses(rank, copy.deepcopy(prepared), config)
    config = _config(3, **_quantized_and_pruned())
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        sharded = Net()
    torch.manual_seed(5)
    found["init"] = _losses(rank, init_compression(sharded, config), config)
    pruned = init_compression(copy.deepcopy(plain), _config(1, **_blocks()))
    _losses(rank, pruned, _config(1, **_blocks()))
    found["masks"] = torch.cat(
        [pruned.up.sparse_pruning_mask.flatten(), pruned.down.sparse_pruning_mask.flatten()]
    )
    _parallel(rank)
    return found


def test_two_ranks_compress_as_one_model(ranks2):
    first, second = ranks2.run(_all)
    # 8-bit weights amplify the order of fp32 sums at most to one level of 256
    for kind in (2, 3, "init"):
        torch.testing.assert_close(first[kind], first[0], rtol=1e-3, atol=1e-5)
    assert first[0] == second[0]
    assert torch.equal(first["masks"], second["masks"]) and first["masks"].mean() == 0.5
