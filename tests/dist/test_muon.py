# SPDX-License-Identifier: Apache-2.0
"""Muon on two ranks: matrices cut by any stage are stepped as wholes, and their momentum is saved and loaded."""

from __future__ import annotations

from pathlib import Path

import torch

import deepspeed
from tests.unit.zero.test_muon import by_svd

LR, ADAM_LR, DECAY = 0.05, 0.01, 0.1


def model() -> torch.nn.Sequential:
    torch.manual_seed(5)
    layers = (torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5), torch.nn.Linear(5, 7))
    return torch.nn.Sequential(*layers)


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(2, 4, 7, generator=generator) for _ in range(steps)]


def plain(steps: int) -> list[torch.Tensor]:
    """The weights after `steps`, in float64, with both ranks' samples in one batch."""
    net = model().double()
    matrices = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.95), eps=1e-10, weight_decay=DECAY)
    momenta = [torch.zeros_like(p) for p in matrices]
    for batch in batches(steps):
        net.zero_grad()
        net(batch.double().flatten(0, 1)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        assert norm > 0.05
        adamw.step()
        with torch.no_grad():
            for param, momentum in zip(matrices, momenta, strict=True):
                momentum.lerp_(param.grad, 0.05)
                update = by_svd(param.grad.lerp(momentum, 0.95))
                update *= max(1.0, param.shape[0] / param.shape[1]) ** 0.5
                param.mul_(1 - LR * DECAY).sub_(LR * update)
    return [p.detach() for p in net.parameters()]


def engine(stage: int, **zero: object) -> deepspeed.DeepSpeedEngine:
    params = {"lr": LR, "adam_lr": ADAM_LR, "weight_decay": DECAY}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.05,
        "optimizer": {"type": "Muon", "params": params},
        "zero_optimization": {"stage": stage, **zero},
    }
    net = model()
    return deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]


def weights(made: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    params = list(made.module.parameters())
    with deepspeed.zero.GatheredParameters(params):
        return [p.detach().clone() for p in params]


def train(made: deepspeed.DeepSpeedEngine, rank: int, given: list[torch.Tensor]) -> None:
    for batch in given:
        made.backward(made(batch[rank]).square().mean())
        made.step()


CELLS = [
    (0, {}),
    (1, {}),
    (2, {}),
    (3, {}),
    (1, {"round_robin_gradients": True}),
    (2, {"offload_optimizer": {"device": "cpu", "ratio": 0.4}}),
    (3, {"reduce_bucket_size": 30, "offload_optimizer": {"device": "cpu"}}),
]


def run(rank: int) -> list[list[torch.Tensor]]:
    found = []
    for stage, zero in CELLS:
        made = engine(stage, **zero)
        train(made, rank, batches(3))
        found.append(weights(made))
        made.destroy()
    return found


def test_every_stage_steps_whole_matrices(ranks2):
    want = plain(3)
    for found in ranks2.run(run):
        for cell, got in zip(CELLS, found, strict=True):
            for one, other in zip(got, want, strict=True):
                # fp32 gradients through five steps that lift small singular values up to 3.4^5 times
                torch.testing.assert_close(
                    one.double(), other, atol=5e-4, rtol=0, msg=lambda m, c=cell: f"{c}: {m}"
                )


def resume(rank: int, folder: str) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    found = []
    for stage, other in ((2, 3), (3, 1)):
        made = engine(stage)
        train(made, rank, batches(2))
        made.save_checkpoint(folder, tag=f"s{stage}")
        train(made, rank, batches(4)[2:])
        again = engine(other)
        again.load_checkpoint(folder, tag=f"s{stage}")
        train(again, rank, batches(4)[2:])
        found.append((weights(made), weights(again)))
        made.destroy()
        again.destroy()
    return found


def test_the_momentum_survives_a_checkpoint_and_another_stage(ranks2, tmp_path: Path):
    for found in ranks2.run(resume, str(tmp_path)):
        for straight, resumed in found:
            for one, other in zip(straight, resumed, strict=True):
                # Only the order of sums in the norm differs between stages.
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
