# SPDX-License-Identifier: Apache-2.0
"""Small models whose layers of experts look like those of Hugging Face models, stacked and listed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class Stacked(nn.Module):
    def __init__(self, experts: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * ffn, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, ffn) / ffn**0.5)

    def one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up_proj[expert].t()).chunk(2, dim=-1)
        return (nn.functional.silu(gate) * up) @ self.down_proj[expert].t()


class Listed(nn.ModuleList):
    def __init__(self, experts: int, hidden: int, ffn: int) -> None:
        def make() -> nn.Module:
            one = nn.Module()
            one.gate_proj = nn.Linear(hidden, ffn, bias=False)
            one.up_proj = nn.Linear(hidden, ffn, bias=False)
            one.down_proj = nn.Linear(ffn, hidden, bias=False)
            return one

        super().__init__(make() for _ in range(experts))

    def one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        e: Any = self[expert]
        return e.down_proj(nn.functional.silu(e.gate_proj(x)) * e.up_proj(x))


class Block(nn.Module):
    """Mixtral's rule: softmax, the best two, normalised; every token through all experts, by a loop."""

    def __init__(self, kind: type, experts: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = kind(experts, hidden, ffn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        best, chosen = self.gate(tokens).softmax(dim=-1).topk(2, dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        shares = torch.zeros(len(tokens), self.gate.out_features, dtype=x.dtype)
        shares = shares.scatter(1, chosen, best)
        parts = [shares[:, e : e + 1] * self.experts.one(e, tokens) for e in range(shares.shape[1])]
        return sum(parts[1:], parts[0]).view_as(x)


class Mixture(nn.Module):
    """Two layers, `model.layers.<i>.mlp`, between linear ones; the loss is the mean square of the output."""

    def __init__(self, kind: type, experts: int = 4, hidden: int = 8, ffn: int = 6) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="mixtral", num_experts_per_tok=2)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Module()
            layer.dense = nn.Linear(hidden, hidden)
            layer.mlp = Block(kind, experts, hidden, ffn)
            self.model.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            x = layer.dense(x)
            x = x + layer.mlp(x)
        return x.square().mean()
