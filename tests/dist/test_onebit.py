# SPDX-License-Identifier: Apache-2.0
"""1-bit Adam, 0/1 Adam and 1-bit LAMB on two ranks, against the papers' arithmetic in float64 for both ranks at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import deepspeed
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.comm.compressed import compressed_mean_, error_sizes

LR, DECAY, BETAS, EPS = 0.001, 0.1, (0.9, 0.99), 1e-8
SHAPES = {"weight": (5, 7), "bias": (5,)}
STEPS = 9


class Exchange:
    """The compressed mean of two ranks' values, with all errors at hand."""

    def __init__(self, numel: int) -> None:
        self.share = error_sizes(numel, 2)[1]
        self.worker = [torch.zeros(numel, dtype=torch.float64) for _ in range(2)]
        self.server = [torch.zeros(n, dtype=torch.float64) for n in self.sizes(numel)]

    def sizes(self, numel: int) -> list[int]:
        return [min(numel, self.share), max(0, numel - self.share)]

    def __call__(self, values: list[torch.Tensor]) -> torch.Tensor:
        shape, sent = values[0].shape, []
        for rank, value in enumerate(values):
            whole = value.flatten() + self.worker[rank]
            coded = self.coded(whole)
            self.worker[rank] = whole - coded
            sent.append(coded)
        parts = (sum(sent) / 2).split(self.sizes(values[0].numel()))
        found = []
        for rank, part in enumerate(parts):
            whole = part + self.server[rank]
            coded = self.coded(whole)
            self.server[rank] = whole - coded
            found.append(coded)
        return torch.cat(found).view(shape)

    @staticmethod
    def coded(whole: torch.Tensor) -> torch.Tensor:
        if not whole.numel():
            return whole
        return torch.where(whole >= 0, 1.0, -1.0).double() * whole.norm() / whole.numel() ** 0.5


def mean_of(rank: int) -> list[torch.Tensor]:
    axis, found = Axis.of_group(None), []
    for numel in (1, 7, 16, 35, 1000):
        sizes = error_sizes(numel, 2)
        errors = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        for turn in range(3):
            values = torch.randn(numel, generator=torch.Generator().manual_seed(turn + 7 * rank))
            found.append(compressed_mean_(values.double(), *errors, axis))
    return found


def test_the_compressed_mean_is_that_of_signs_and_makes_up_for_errors(ranks2):
    results, at = ranks2.run(mean_of), 0
    for numel in (1, 7, 16, 35, 1000):
        exchange = Exchange(numel)
        for turn in range(3):
            seeds = (turn, turn + 7)
            values = [torch.randn(numel, generator=torch.Generator().manual_seed(s)) for s in seeds]
            want = exchange([value.double() for value in values])
            for rank in range(2):
                torch.testing.assert_close(results[rank][at], want, atol=1e-12, rtol=0)
            at += 1


def grads_of(weights: list[dict], step: int) -> list[dict]:
    """Each rank's gradients: of the mean squared distance of a linear layer's outputs from its own targets."""
    found = []
    for rank, own in enumerate(weights):
        params = {name: value.clone().requires_grad_() for name, value in own.items()}
        x, y = (part.double() for part in batch(rank, step))
        loss = (torch.nn.functional.linear(x, params["weight"], params["bias"]) - y).square().mean()
        loss.backward()
        found.append({name: param.grad for name, param in params.items()})
    return found


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + 2 * step + rank)
    return torch.randn(4, 7, generator=generator), torch.randn(4, 5, generator=generator)


def started() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(shape, generator=generator).double() for n, shape in SHAPES.items()}


def corrected(m, v, step: int, updates: int) -> torch.Tensor:
    return (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** updates)).sqrt() + EPS)


def onebit_adam(freeze: int) -> list[dict]:
    weights = started()
    m, v = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    exchange = {n: Exchange(w.numel()) for n, w in weights.items()}
    for step in range(1, STEPS + 1):
        grads = grads_of([weights, weights], step)
        for name, weight in weights.items():
            both = [g[name] for g in grads]
            if step <= freeze:
                grad = (both[0] + both[1]) / 2
                m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * grad
                v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * grad**2
            else:
                m[name] = exchange[name]([BETAS[0] * m[name] + (1 - BETAS[0]) * g for g in both])
            update = corrected(m[name], v[name], step, min(step, freeze)) + DECAY * weight
            weights[name] = weight - LR * update
    return [weights, weights]


def zero_one_adam(freeze: int, scaler: int, local_scaler: int, clipper: int) -> list[dict]:
    ranks = [started(), started()]
    names = list(SHAPES)
    m = [{n: torch.zeros_like(w) for n, w in ranks[0].items()} for _ in range(2)]
    v = {n: torch.zeros_like(w) for n, w in ranks[0].items()}
    exchange = {n: Exchange(w.numel()) for n, w in ranks[0].items()}
    distance, seen, updates, local, count, rates = 1, 0, 0, 1, 0, 0.0
    done, anchor = None, None
    for step in range(1, STEPS + 1):
        grads = grads_of(ranks, step)
        if step <= freeze:
            updating = step % distance == 0
            updates += updating
            for n in names:
                both = [g[n] for g in grads]
                grad = (both[0] + both[1]) / 2 if updating else exchange[n](both)
                if updating:
                    v[n] = BETAS[1] * v[n] + (1 - BETAS[1]) * grad**2
                for r in range(2):
                    m[r][n] = BETAS[0] * m[r][n] + (1 - BETAS[0]) * grad
                    step_by = corrected(m[r][n], v[n], step, updates) + DECAY * ranks[r][n]
                    ranks[r][n] = ranks[r][n] - LR * step_by
            seen += updating
            if seen == scaler:
                distance, seen = distance * 2, 0
            continue
        if done is None:
            done = [{n: torch.zeros_like(v[n]) for n in names} for _ in range(2)]
            exchange = {n: Exchange(v[n].numel()) for n in names}
        if not rates:
            anchor = {n: ranks[0][n] for n in names}
            assert all(torch.equal(ranks[0][n], ranks[1][n]) for n in names)
        rates += LR
        for r in range(2):
            for n in names:
                m[r][n] = BETAS[0] * m[r][n] + (1 - BETAS[0]) * grads[r][n]
                done[r][n] = done[r][n] + LR * m[r][n]
                step_by = corrected(m[r][n], v[n], step, updates) + DECAY * ranks[r][n]
                ranks[r][n] = ranks[r][n] - LR * step_by
        if step % local == 0:
            for n in names:
                mean = exchange[n]([done[0][n], done[1][n]])
                whole = anchor[n] * (1 - rates * DECAY) - corrected(mean, v[n], step, updates)
                for r in range(2):
                    ranks[r][n], m[r][n] = whole, mean / rates
                    done[r][n] = torch.zeros_like(mean)
            rates = 0.0
        count += 1
        if count == local_scaler:
            local, count = min(clipper, local * 2), 0
    return ranks


def onebit_lamb(freeze: int) -> list[dict]:
    weights = started()
    names = list(SHAPES)
    m, v, fresh = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(3))
    exchange = {n: Exchange(w.numel()) for n, w in weights.items()}
    kept, last = dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0)
    for step in range(1, STEPS + 1):
        grads = grads_of([weights, weights], step)
        for n in names:
            both = [g[n] for g in grads]
            if step <= freeze:
                grad = (both[0] + both[1]) / 2
                m[n] = BETAS[0] * m[n] + (1 - BETAS[0]) * grad
                v[n] = fresh[n] = BETAS[1] * v[n] + (1 - BETAS[1]) * grad**2
                update = corrected(m[n], v[n], step, step) + DECAY * weights[n]
                ratio = min(max(float(weights[n].norm() / update.norm()), 0.01), 10.0)
                kept[n] = 0.9 * kept[n] + 0.1 * ratio
            else:
                old = m[n]
                m[n] = exchange[n]([BETAS[0] * old + (1 - BETAS[0]) * g for g in both])
                grad = (m[n] - BETAS[0] * old) / (1 - BETAS[0])
                fresh[n] = BETAS[1] * fresh[n] + (1 - BETAS[1]) * grad**2
                plain = corrected(m[n], v[n], step, freeze)
                update = plain + DECAY * weights[n]
                factor = float(((v[n].sqrt() + EPS) / (fresh[n].sqrt() + EPS)).max())
                share = min(1.0, float(plain.norm() / update.norm()))
                factor = min(max(factor * share + 1 - share, 0.5), 4.0)
                factor = last[n] = min(max(factor, 0.9 * last[n]), 1.1 * last[n])
                ratio = kept[n] * factor
            weights[n] = weights[n] - LR * ratio * update
    return [weights, weights]


CASES = {
    "OneBitAdam": ({"freeze_step": 4}, lambda: onebit_adam(4)),
    "ZeroOneAdam": (
        {
            "var_freeze_step": 5,
            "var_update_scaler": 2,
            "local_step_scaler": 2,
            "local_step_clipper": 4,
        },
        lambda: zero_one_adam(5, 2, 2, 4),
    ),
    "OneBitLamb": ({"freeze_step": 4}, lambda: onebit_lamb(4)),
}


def engine(kind: str, options: dict, dtype: torch.dtype = torch.float32):
    layer = torch.nn.Linear(7, 5)
    layer.load_state_dict({name: value.float() for name, value in started().items()})
    params = {"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS, **options}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": kind, "params": params},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    return deepspeed.initialize(model=layer, config=config)[0]


def train(made, rank: int, steps, dtype: torch.dtype = torch.float32) -> None:
    for step in steps:
        x, y = (part.to(dtype) for part in batch(rank, step))
        made.backward((made(x) - y).square().mean())
        made.step()


def run(rank: int) -> dict[str, dict]:
    found = {}
    for kind, (options, _) in CASES.items():
        made = engine(kind, options)
        train(made, rank, range(1, STEPS + 1))
        found[kind] = {n: p.detach().clone() for n, p in made.module.named_parameters()}
        # Masters of a 16-bit model: flat, and for LAMB one a parameter.
        low = engine(kind, options, torch.bfloat16)
        train(low, rank, range(1, STEPS + 1), torch.bfloat16)
        found[kind + " bf16"] = {n: p.detach().clone() for n, p in low.module.named_parameters()}
        assert len(low.optimizer.groups) == (2 if kind == "OneBitLamb" else 1)
        wrapper = "FP16_UnfusedOptimizer" if kind == "OneBitLamb" else "FP16_Optimizer"
        assert type(low.optimizer).__name__ == wrapper
        made.destroy()
        low.destroy()
    return found


def test_weights_follow_the_papers(ranks2):
    results = ranks2.run(run, timeout=240)
    for kind, (_, reference) in CASES.items():
        for rank, want in enumerate(reference()):
            for name, value in want.items():
                # Nine fp32 steps; what is sent is the signs of sums, none of which is near zero here.
                got = results[rank][kind][name].double()
                torch.testing.assert_close(
                    got, value, atol=2e-5, rtol=0, msg=lambda m, k=kind: f"{k}: {m}"
                )
                # bf16 gradients turn small signs around, so the states' shapes are what this one shows.
                low = results[rank][kind + " bf16"][name].double()
                moved = (value - started()[name]).norm()
                assert (low - value).norm() < max(0.5 * moved, 0.05), kind
        if kind != "ZeroOneAdam":
            assert all(results[0][kind][n].equal(results[1][kind][n]) for n in SHAPES)


def saved(rank: int, folder: str) -> None:
    made = engine("OneBitAdam", {"freeze_step": 2})
    train(made, rank, range(1, 5))
    assert made.optimizer.adam_freeze_key and made.optimizer.reduces_itself
    made.optimizer.param_groups[0]["exp_avg_mask"] = torch.ones(35)
    made.save_checkpoint(folder)
    for freeze in (2, 20):
        again = engine("OneBitAdam", {"freeze_step": freeze})
        again.load_checkpoint(folder)
        assert "exp_avg_mask" not in again.optimizer.param_groups[0], "a mask belongs to the model"
        assert again.optimizer.adam_freeze_key is (freeze == 2)
        train(again, rank, range(5, 7))
        weight = again.module.weight.detach()
        other = weight.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(weight, other)
        again.destroy()
    made.destroy()


def test_a_checkpoint_tells_which_phase_it_is_of(ranks2, tmp_path: Path):
    ranks2.run(saved, str(tmp_path))


def broken(rank: int) -> None:
    made = engine("OneBitAdam", {"freeze_step": 1}, torch.bfloat16)
    train(made, rank, range(1, 3), torch.bfloat16)
    x, y = (part.bfloat16() for part in batch(rank, 3))
    made.backward((made(x) - y).square().mean() * (math.inf if rank else 1.0))
    made.step()
    assert made.optimizer.overflow, "one rank's overflow is everybody's"
    train(made, rank, range(4, 5), torch.bfloat16)
    assert made.module.weight.isfinite().all()
    made.destroy()
    with pytest.raises(AssertionError, match="not compatible with ZeRO"):
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
        config["optimizer"] = {"type": "OneBitAdam", "params": {}}
        deepspeed.initialize(model=torch.nn.Linear(2, 2), config=config)


def test_ranks_skip_an_overflow_together_and_zero_is_refused(ranks2):
    ranks2.run(broken)
