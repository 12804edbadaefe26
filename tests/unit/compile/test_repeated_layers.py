# SPDX-License-Identifier: Apache-2.0
"""Layers of one class behind a break of the graph: dynamo traces them once, and their gradients are their own."""

from __future__ import annotations

import copy

import pytest
import torch

import deepspeed
from deepspeed.compile.util import is_deepcompile_supported
from deepspeed.utils import safe_get_full_grad


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


@pytest.mark.skipif(not is_deepcompile_supported(), reason="needs torch >= 2.6")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [2, 3])
def test_each_layer_has_its_own_gradient(stage):
    torch.manual_seed(0)
    net = Layers()
    plain = copy.deepcopy(net)
    config = {
        "train_batch_size": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "compile": {"deepcompile": True},
    }
    engine = deepspeed.initialize(model=net, config=config)[0]
    engine.compile(backend="eager")
    for rows in (3, 3, 2):
        x = torch.randn(rows, 4)
        engine.backward(engine(x).square().mean())
        plain.zero_grad()
        plain(x).square().mean().backward()
        for param, want in zip(net.parameters(), plain.parameters(), strict=True):
            # the same products in fp32, in another order at most
            torch.testing.assert_close(safe_get_full_grad(param), want.grad, rtol=1e-5, atol=1e-6)
        engine.step()
    engine.destroy()
