# SPDX-License-Identifier: Apache-2.0
"""A small run with offloaded states, and ZenFlow as a plain loop in float64 to compare it with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import deepspeed

STEPS = 11
BATCH = 4
RULE = {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}


class Net(torch.nn.Module):
    """A matrix, a kernel of three dimensions, vectors, and sizes that fit no shard."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(7, 5)
        self.kernel = torch.nn.Conv1d(1, 3, 3)
        self.last = torch.nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = torch.tanh(self.kernel(hidden.unsqueeze(1))).flatten(1)
        return self.last(hidden)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same numbers for a step, a micro-batch and a rank; columns of different weight in turn."""
    made = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    x = torch.randn(BATCH, 7, generator=made)
    x[:, step // 3 % 7] *= 4
    return x, torch.randn(BATCH, 4, generator=made)


def loss_of(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x).to(y.dtype) - y).square().mean()


def config(stage: int, zero: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": RULE},
        "zero_optimization": {
            "stage": stage,
            "offload_optimizer": {"device": "cpu"},
            "stage3_param_persistence_threshold": 0,
            **(zero or {}),
        },
        **more,
    }


def engine(stage: int, zero: dict[str, Any] | None = None, *, seed: int = 0, **more: Any) -> Any:
    return deepspeed.initialize(model=net(seed), config=config(stage, zero, **more))[0]


def train(made: Any, rank: int = 0, first: int = 0, last: int = STEPS) -> list[float]:
    """Losses of the steps from `first` to before `last`."""
    losses = []
    for step in range(first, last):
        for micro in range(made.gradient_accumulation_steps()):
            x, y = (t.to(made.device, made.get_data_types()[0]) for t in batch(step, micro, rank))
            loss = loss_of(made, x, y)
            made.backward(loss)
            made.step()
            losses.append(loss.item())
    return losses


def weights(made: Any) -> dict[str, torch.Tensor]:
    """The masters, whole, by name; a collective."""
    return {
        name: deepspeed.utils.safe_get_full_fp32_param(param).cpu().clone()
        for name, param in made.module.named_parameters()
    }


def seen(made: Any) -> dict[str, torch.Tensor]:
    """The parameters as the model computes with them; a collective."""
    found = {}
    for name, param in made.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param):
            found[name] = param.detach().float().cpu().clone()
    return found


@dataclass
class Loop:
    """ZenFlow by masks over whole parameters; `update` and `choose` are in steps.

    Attributes:
        shown: what the model computes with; `high` is what the optimizer holds.
    """

    ratio: float = 0.3
    update: int = 3
    choose: int = 10**9
    warm_up: int = 0
    overlap: bool = False
    clip: float = 0.0
    ranks: int = 1
    accumulation: int = 1

    def run(self, steps: int = STEPS) -> dict[str, torch.Tensor]:
        model = net().double()
        names = [name for name, _ in model.named_parameters()]
        self.shown = list(model.parameters())
        self.high = [p.detach().clone() for p in self.shown]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.high]
        self.rest = [torch.zeros_like(p) for p in self.high]
        self.chosen: list[torch.Tensor] | None = None
        self.slow = self.fast = self.waiting = self.since = 0
        for step in range(steps):
            self._step(step, self._grads(model, step))
        return dict(zip(names, self.high, strict=True))

    def _grads(self, model: Any, step: int) -> list[torch.Tensor]:
        model.zero_grad()
        for micro in range(self.accumulation):
            for rank in range(self.ranks):
                x, y = (t.double() for t in batch(step, micro, rank))
                (loss_of(model, x, y) / (self.accumulation * self.ranks)).backward()
        grads = [p.grad.clone() for p in self.shown]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        excess = max(1.0, (norm + 1e-6) / self.clip) if self.clip else 1.0
        return [g / excess for g in grads]

    @torch.no_grad()
    def _step(self, step: int, grads: list[torch.Tensor]) -> None:
        every = [torch.ones_like(p, dtype=torch.bool) for p in self.high]
        if step < self.warm_up:
            self.slow += 1
            self._adam(every, self.slow, grads)
            self._show(every)
            return
        if self.chosen is None:
            self.chosen = [self._choice(g) for g in grads]
            self.fast, self.since = self.slow, 0
        others = [~mask for mask in self.chosen]
        self.fast, self.waiting, self.since = self.fast + 1, self.waiting + 1, self.since + 1
        self._adam(self.chosen, self.fast, grads)
        self._show(self.chosen)
        for total, grad in zip(self.rest, grads, strict=True):
            total += grad
        if self.waiting < self.update:
            return
        self._show(others)
        self.slow += 1
        self._adam(others, self.slow, [total / self.waiting for total in self.rest])
        self.waiting = 0
        for total in self.rest:
            total.zero_()
        again = self.since >= self.choose
        if again or not self.overlap:
            self._show(others)
        if again:
            for mask, moments in zip(self.chosen, self.moments, strict=True):
                for beta, moment in zip(RULE["betas"], moments, strict=True):
                    moment[mask] *= (1 - beta**self.slow) / (1 - beta**self.fast)
            self.chosen = None

    def _choice(self, grad: torch.Tensor) -> torch.Tensor:
        if grad.dim() < 2:
            return torch.ones_like(grad, dtype=torch.bool)
        matrix = grad.reshape(len(grad), -1)
        count = math.ceil(self.ratio * matrix.shape[1] - 1e-9)
        best = matrix.square().sum(0).topk(count).indices
        mask = torch.zeros_like(matrix, dtype=torch.bool)
        mask[:, best] = True
        return mask.view_as(grad)

    def _show(self, masks: list[torch.Tensor]) -> None:
        for shown, high, mask in zip(self.shown, self.high, masks, strict=True):
            shown[mask] = high[mask]

    def _adam(self, masks: list[torch.Tensor], count: int, grads: list[torch.Tensor]) -> None:
        beta1, beta2 = RULE["betas"]
        for high, (m, v), grad, mask in zip(self.high, self.moments, grads, masks, strict=True):
            g, p = grad[mask], high[mask] * (1 - RULE["lr"] * RULE["weight_decay"])
            m[mask] = beta1 * m[mask] + (1 - beta1) * g
            v[mask] = beta2 * v[mask] + (1 - beta2) * g * g
            root = (v[mask] / (1 - beta2**count)).sqrt() + RULE["eps"]
            high[mask] = p - RULE["lr"] * m[mask] / (1 - beta1**count) / root
