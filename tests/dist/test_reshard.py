# SPDX-License-Identifier: Apache-2.0
"""What any number of ranks saved at any stage, any other number loads at any stage: states bit for bit, then the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpointing import Net, config, same, state_of

SAVE_AT, STEPS, BATCH = 3, 8, 12
CELLS = [(stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16", "fp16")]
STATES = (".master", ".exp_avg", ".exp_avg_sq")
ON_CPU = {"offload_optimizer": {"device": "cpu"}}


def build(stage: int, dtype: str, seed: int, zero: dict[str, Any] | None = None) -> Any:
    import deepspeed

    torch.manual_seed(seed)
    model = Net()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = {"torch_adam": False} if zero else None
    settings = {**config(stage, dtype, zero, adam), "train_batch_size": BATCH}
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]


def train(made: Any, first: int, last: int, rank: int, ranks: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(last):
        x = torch.randint(0, 7, (BATCH,), generator=generator)
        y = torch.randint(0, 7, (BATCH,), generator=generator)
        if step >= first:
            loss = made(x.chunk(ranks)[rank], y.chunk(ranks)[rank])
            made.backward(loss)
            made.step()
            losses.append(loss.item())
    return losses


def save_all(rank: int, ranks: int, folder: Path) -> dict[Any, Any]:
    found = {}
    for stage, dtype in CELLS:
        made = build(stage, dtype, 0)
        train(made, 0, SAVE_AT, rank, ranks)
        made.save_checkpoint(folder / f"{ranks}_{stage}_{dtype}")
        found[stage, dtype] = state_of(made), train(made, SAVE_AT, STEPS, rank, ranks)
    return found


def load_all(rank: int, ranks: int, folder: Path) -> dict[Any, Any]:
    """Load what each number of ranks saved: at its stage what this number saved, at others the rest."""
    found = {}
    for source in range(1, 5):
        for stage, dtype in CELLS:
            after = (stage + source - ranks) % 4
            for zero in (None, ON_CPU) if source == 2 and after else (None,):
                made = build(after, dtype, 9 + rank, zero)
                path, _ = made.load_checkpoint(folder / f"{source}_{stage}_{dtype}")
                assert path is not None
                state = state_of(made)
                losses = train(made, SAVE_AT, STEPS, rank, ranks)
                found[source, stage, dtype, after, zero is not None] = state, losses
    return found


def mean(by_rank: list[dict[Any, Any]], key: Any) -> list[float]:
    return torch.tensor([found[key][1] for found in by_rank]).double().mean(0).tolist()


@pytest.mark.slow
def test_every_cell_is_taken_over(ranks2: Any, ranks3: Any, ranks4: Any, tmp_path: Path) -> None:
    pools = {2: ranks2, 3: ranks3, 4: ranks4}

    def on(ranks: int, function: Any) -> list[dict[Any, Any]]:
        if ranks == 1:
            return [function(0, 1, tmp_path)]
        return pools[ranks].run(function, ranks, tmp_path, timeout=400)

    saved = {ranks: on(ranks, save_all) for ranks in range(1, 5)}
    pairs = set()
    for ranks in range(1, 5):
        loaded = on(ranks, load_all)
        for key in loaded[0]:
            source, stage, dtype, after, on_cpu = key
            state, now = saved[source][0][stage, dtype][0], loaded[0][key][0]
            # stage 3 shows no whole weight outside of a gather; fp32 at stage 0 keeps no master
            whole = stage < 3 and after < 3
            names = [n for n in set(state) & set(now) if whole or n.endswith(STATES)]
            assert len([n for n in names if n.endswith("exp_avg_sq")]) == 6
            assert same({n: state[n] for n in names}, {n: now[n] for n in names}) == [], key
            wanted, got = mean(saved[source], (stage, dtype)), mean(loaded, key)
            if (source, stage, on_cpu) == (ranks, after, False):
                assert got == wanted, key
            else:
                # Sums over another number of ranks, or steps of slabs of other sizes, round otherwise:
                # up to 64 ulp of fp32, 4 of bf16 and 16 of fp16 after five steps with a large rate.
                ulp = {"fp32": 64 * 2**-23, "bf16": 4 * 2**-8, "fp16": 16 * 2**-11}[dtype]
                assert got == pytest.approx(wanted, rel=ulp, abs=0), key
            pairs.add((source, ranks, stage, after))
    assert {(a, b) for a, b, _, _ in pairs} == {(a, b) for a in range(1, 5) for b in range(1, 5)}
    assert {(a, b) for _, _, a, b in pairs} == {(a, b) for a in range(4) for b in range(4)}
