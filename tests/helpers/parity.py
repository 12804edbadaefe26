# SPDX-License-Identifier: Apache-2.0
"""One training run twice: through the engine, and through a plain torch loop that knows nothing of it.

The plain loop keeps what every mixed-precision recipe keeps: low-precision weights, fp32 masters, gradients that add up
in the weights' dtype. It sees the batches of all ranks and averages by hand, so it needs no processes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 256.0
LR, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.95), 1e-8
MICRO, STEPS = 3, 4


@dataclass(frozen=True)
class Cell:
    """One cell of the grid."""

    stage: int = 0
    dtype: str = "fp32"
    offload: bool = False
    accumulate: int = 1
    clip: bool = False
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        tier = "cpu" if self.offload else "device"
        return f"stage{self.stage}-{self.dtype}-{tier}-acc{self.accumulate}-clip{int(self.clip)}"

    @property
    def max_norm(self) -> float:
        # Well below the norms of this model's gradients (0.3 to 3), so that clipping always acts.
        return 0.05 if self.clip else 0.0

    def config(self, ranks: int) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.max_norm,
            "zero_optimization": zero,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY},
            },
        }
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        if self.dtype == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
        config.update(self.extra)
        return config


def model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Module:
    """Sizes are odd on purpose: no parameter fits a shard or a vector register."""
    torch.manual_seed(5)
    net = torch.nn.Sequential(
        torch.nn.Linear(13, 33),
        torch.nn.GELU(),
        torch.nn.Linear(33, 17),
        torch.nn.LayerNorm(17),
        torch.nn.Linear(17, 5),
    )
    return net.to(device, dtype)


def batch(
    step: int, micro: int, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one micro-batch of one rank."""
    seed = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    x = torch.randn(MICRO, 13, generator=seed)
    y = torch.randn(MICRO, 5, generator=seed)
    return x.to(device, dtype), y.to(device, dtype)


def loss_of(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (net(x).float() - y.float()).square().mean()


@dataclass
class Run:
    """What a run leaves: this rank's losses, final weights, gradient norms."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    norms: list[float]


def engine_run(cell: Cell, rank: int = 0, ranks: int = 1, device: str = "cpu") -> Run:
    """Train through `deepspeed.initialize`."""
    import deepspeed

    net = model()
    engine, *_ = deepspeed.initialize(model=net, config=cell.config(ranks))
    dtype = DTYPES[cell.dtype]
    losses, norms = [], []
    for step in range(STEPS):
        for micro in range(cell.accumulate):
            loss = loss_of(engine, *batch(step, micro, rank, dtype, device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norm = engine.get_global_grad_norm()
        norms.append(float("nan") if norm is None else float(norm))
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    engine.destroy()
    return Run(losses, weights, norms)


def _mean_grads(
    net: torch.nn.Module,
    cell: Cell,
    step: int,
    rank: int,
    ranks: int,
    scale: float,
    losses: list[float],
    device: str,
) -> list[torch.Tensor]:
    """Gradients of one step, summed over micro-batches and averaged over ranks, in the weights' dtype.

    Stages 0 and 1 average sums; stage 2 has no room for sums that are not reduced, so it sums averages.
    """
    windows = [[m] for m in range(cell.accumulate)] if cell.stage >= 2 else [range(cell.accumulate)]
    total: list[torch.Tensor] | None = None
    for window in windows:
        of_ranks = []
        for source in range(ranks):
            net.zero_grad()
            for micro in window:
                inputs = batch(step, micro, source, DTYPES[cell.dtype], device)
                loss = loss_of(net, *inputs)
                ((loss / cell.accumulate if cell.accumulate > 1 else loss) * scale).backward()
                if source == rank:
                    losses.append(loss.item())
            of_ranks.append([p.grad for p in net.parameters()])
        means = [_average(grads, cell.stage) for grads in zip(*of_ranks, strict=True)]
        total = means if total is None else [t + m for t, m in zip(total, means, strict=True)]
    assert total is not None
    return total


def _average(grads: tuple[torch.Tensor, ...], stage: int) -> torch.Tensor:
    """The mean over ranks: summed in fp32 in the order of ranks, divided before (ZeRO) or after (stage 0)."""
    share, dtype = 1.0 / len(grads), grads[0].dtype
    if len(grads) == 1:
        return grads[0]
    if stage > 0:
        return sum((g * share).float() for g in grads).to(dtype)
    return sum(g.float() for g in grads).to(dtype) * share


def plain_run(cell: Cell, rank: int = 0, ranks: int = 1, device: str = "cpu") -> Run:
    """The same by hand: torch's own AdamW on masters, one tensor at a time."""
    dtype = DTYPES[cell.dtype]
    net = model(dtype, device)
    params = list(net.parameters())
    # Masters start from the weights as they were before the cast: `initialize` casts the module first, so do we.
    masters = [p.detach().float().clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(
        masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False, fused=False
    )
    scale = LOSS_SCALE if cell.dtype == "fp16" else 1.0
    losses, norms = [], []
    for step in range(STEPS):
        mean = _mean_grads(net, cell, step, rank, ranks, scale, losses, device)
        norm = sum(g.double().square().sum() for g in mean).sqrt().item() / scale
        norms.append(norm)
        divisor = scale
        in_place = cell.stage == 0 and cell.dtype == "fp32"
        if cell.clip and not in_place:
            divisor = scale * max(1.0, (norm + 1e-6) / cell.max_norm)
        for master, grad in zip(masters, mean, strict=True):
            master.grad = grad.float() * (1.0 / divisor)
        if cell.clip and in_place:
            # The engine steps the module's own parameters here and clips them as torch users do.
            torch.nn.utils.clip_grad_norm_(masters, cell.max_norm)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(params, masters, strict=True):
                p.copy_(master)
    return Run(losses, {name: p.detach().clone() for name, p in net.named_parameters()}, norms)


def grid(stages: tuple[int, ...] = (0, 1, 2, 3)) -> list[Cell]:
    """All cells; offload has no meaning at stage 0."""
    return [
        Cell(stage, dtype, offload, accumulate, clip)
        for stage in stages
        for dtype in DTYPES
        for offload in ((False, True) if stage else (False,))
        for accumulate in (1, 3)
        for clip in (False, True)
    ]


# torch's Windows build fuses multiply and add in the vector body of `lerp` and `add(alpha=)` but not in the scalar
# tail, so an element's last bit depends on where it lies: in a slab not as in its own param
SLABS_ROUND_ALIKE = sys.platform != "win32"


def compare(got: Run, want: Run, cell: Cell, exact: bool) -> None:
    """Fail unless two runs agree.

    `exact`: bit for bit, where the place of an element does not show (SLABS_ROUND_ALIKE). Otherwise the native rule may fuse a multiply and an add, which moves a master weight by one
    ulp a step; the weights, all below 1 here, by STEPS ulps of fp32 at 1, and a 16-bit weight by one rounding of its own.
    """
    if exact and SLABS_ROUND_ALIKE:
        assert got.losses == want.losses
        for name, value in want.weights.items():
            assert torch.equal(got.weights[name], value), name
    else:
        resolution = torch.finfo(DTYPES[cell.dtype]).eps
        torch.testing.assert_close(
            got.losses, want.losses, rtol=max(1e-6, resolution / 4), atol=1e-6
        )
        for name, value in want.weights.items():
            torch.testing.assert_close(
                got.weights[name], value, rtol=resolution, atol=STEPS * 1.2e-7
            )
    if not (cell.stage == 0 and cell.dtype == "fp32"):  # plain fp32 records no norm
        torch.testing.assert_close(got.norms, want.norms, rtol=1e-6, atol=0.0)
