# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several ranks: resumed bit for bit, by any other number of ranks, and never half saved."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpointing import SAVE_AT, STEPS, engine, same, state_of, train

GOLDEN = Path(__file__).parents[1] / "contract" / "golden"
CPU = {
    "zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    "adam": {"torch_adam": False},
}


def save(
    rank: int, ranks: int, folder: Path, stage: int, dtype: str, options: dict[str, Any]
) -> tuple[Any, list[float]]:
    """State at the save, and the losses after it."""
    made = engine(stage, dtype, **options)
    train(made, 0, SAVE_AT, rank, ranks)
    made.save_checkpoint(folder)
    return state_of(made), train(made, SAVE_AT, STEPS, rank, ranks)


def load(
    rank: int, ranks: int, folder: Path, stage: int, dtype: str, options: dict[str, Any]
) -> tuple[Any, list[float]]:
    made = engine(stage, dtype, seed=9 + rank, **options)
    path, _ = made.load_checkpoint(folder)
    assert path is not None
    return state_of(made), train(made, SAVE_AT, STEPS, rank, ranks)


@pytest.mark.parametrize("options", [{}, CPU], ids=["device", "part_on_host"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_continue_bit_for_bit(
    stage: int, dtype: str, options: Any, ranks2: Any, tmp_path: Path
) -> None:
    if stage == 0 and options:
        pytest.skip("a partial ratio needs a sharded optimizer")
    saved = ranks2.run(save, 2, tmp_path, stage, dtype, options)
    loaded = ranks2.run(load, 2, tmp_path, stage, dtype, options)
    for (state, losses), (state_then, losses_then) in zip(saved, loaded, strict=True):
        assert same(state_then, state) == []
        assert losses_then == losses
    names = {p.name for p in (tmp_path / "global_step3").iterdir()}
    prefix = "bf16_" if dtype == "bf16" else ""
    shards = (
        {f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in (0, 1)} if stage else set()
    )
    assert names == {"mp_rank_00_model_states.pt", "manifest.json"} | shards


def alone(
    rank: int, folder: Path, stage: int, dtype: str, saving: bool, options: dict[str, Any]
) -> Any:
    """The same run in one process, within this one."""
    return (save if saving else load)(0, 1, folder, stage, dtype, options)[0]


@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [(2, 1, "fp32"), (1, 2, "bf16"), (2, 2, "fp16"), (0, 2, "bf16"), (2, 0, "fp32")],
)
def test_three_ranks_take_over_from_two_and_two_from_three(
    before: int, after: int, dtype: str, ranks2: Any, ranks3: Any, tmp_path: Path
) -> None:
    # micro-batches of 8 samples cannot be shared by three ranks: only states are compared there
    state = ranks2.run(save, 2, tmp_path / "a", before, dtype, {})[0][0]
    over = ranks3.run(hand_over, tmp_path / "a", tmp_path / "b", after, dtype)
    back = ranks2.run(take_back, tmp_path / "b", before, dtype)
    for other in (*over, *back):
        common = set(state) & set(other)
        assert len([key for key in common if key.endswith("exp_avg")]) == 6
        assert same({k: state[k] for k in common}, {k: other[k] for k in common}) == []


def hand_over(rank: int, source: Path, target: Path, stage: int, dtype: str) -> Any:
    made = engine_of_three(stage, dtype)
    made.load_checkpoint(source)
    made.save_checkpoint(target, tag="t")
    return state_of(made)


def take_back(rank: int, source: Path, stage: int, dtype: str) -> Any:
    made = engine(stage, dtype, seed=9)
    made.load_checkpoint(source)
    return state_of(made)


def engine_of_three(stage: int, dtype: str) -> Any:
    import deepspeed
    from tests.helpers import checkpointing

    torch.manual_seed(4)
    model = checkpointing.Net()
    settings = {**checkpointing.config(stage, dtype), "train_batch_size": 9}
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]


RECORDED = (
    "s1_fp32_w2",
    "s2_bf16_w2",
    "s2_fp32_w2_frozen",
    "s2_fp32_w2_offload",
    "s2_fp32_w2_elastic",
    "s3_fp32_w2",
    "s3_bf16_w2_frozen",
    "s1_fp32_w2_universal",
    "s3_fp32_w2_universal",
)


def test_upstreams_recorded_runs_of_two_ranks_continue_at_their_stage_and_another(
    ranks2: Any,
) -> None:
    for (name, stage), losses in ranks2.run(load_recorded)[0].items():
        recorded = json.loads((GOLDEN / name / "losses.json").read_text(encoding="utf-8"))
        # another build of torch, or another CPU, may order its sums differently
        tolerance = 2e-2 if "bf16" in name else 1e-5
        case = f"{name} at stage {stage}: "
        assert losses == pytest.approx(recorded[SAVE_AT:], rel=tolerance, abs=0), case


def load_recorded(rank: int) -> dict[tuple[str, int], list[float]]:
    os.environ["DS_LOWP_PRODUCTS"] = "0"
    losses = {}
    for name in RECORDED:
        stage, dtype, *rest = name.split("_")
        options: dict[str, Any] = {}
        if "universal" in rest:
            options["checkpoint"] = {"load_universal": True}
        for own in (int(stage[1]), 3 if stage != "s3" else 2):
            made = engine(own, dtype, seed=9 + rank, frozen="frozen" in rest, **options)
            made.load_checkpoint(GOLDEN / name)
            losses[name, own] = train(made, SAVE_AT, STEPS, rank, 2)
    return losses


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_cannot_write_stops_the_save_on_all(
    bad: int, ranks2: Any, tmp_path: Path
) -> None:
    texts = ranks2.run(fail_to_write, bad, tmp_path)
    assert all("no space at all" in text for text in texts), texts
    assert "rank" in texts[1 - bad]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "global_step0",
        "latest",
        "zero_to_fp32.py",
    ]


def fail_to_write(rank: int, bad: int, folder: Path) -> str:
    from deepspeed.checkpoint import atomic

    class Full(atomic.Disk):
        def write(self, file: Any, data: Any) -> None:
            raise OSError(28, "no space at all")

    made = engine(2, "fp32")
    made.save_checkpoint(folder)
    train(made, 0, 1, rank, 2)
    before = atomic.disk
    atomic.disk = Full() if rank == bad else before
    try:
        made.save_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        atomic.disk = before
    return "saved"


def test_a_damaged_shard_stops_the_load_on_all(ranks2: Any, tmp_path: Path) -> None:
    ranks2.run(save, 2, tmp_path, 1, "fp32", {})
    path = tmp_path / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-5])
    texts = ranks2.run(fail_to_load, tmp_path)
    assert all("zero_pp_rank_1" in text for text in texts), texts


def fail_to_load(rank: int, folder: Path) -> str:
    try:
        engine(1, "fp32").load_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.mark.parametrize("mode", ["Warn", "Fail", "Ignore"])
def test_tags_that_differ(mode: str, ranks2: Any, tmp_path: Path) -> None:
    outcomes = ranks2.run(save_under_two_tags, mode, tmp_path)
    if mode == "Fail":
        assert all(
            text.startswith("AssertionError") and "rank 1: 'tag1'" in text for text in outcomes
        )
        assert list(tmp_path.iterdir()) == []
    else:
        assert outcomes == ["saved", "saved"]
        assert (tmp_path / "latest").read_text(encoding="utf-8") == "tag0"
        assert len(list((tmp_path / "tag0").glob("*_optim_states.pt"))) == 2


def save_under_two_tags(rank: int, mode: str, folder: Path) -> str:
    import deepspeed
    from tests.helpers import checkpointing

    model = checkpointing.Net()
    settings = {**checkpointing.config(1, "fp32"), "checkpoint": {"tag_validation": mode}}
    made = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[
        0
    ]
    try:
        made.save_checkpoint(folder, tag=f"tag{rank}")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_each_node_keeps_its_own_files_if_so_asked(ranks2: Any, tmp_path: Path) -> None:
    # two ranks of two nodes with storage of their own: each folder gets what its rank wrote
    ranks2.run(save_on_own_storage, tmp_path)
    for rank in (0, 1):
        names = {p.name for p in (tmp_path / str(rank) / "t").iterdir()}
        assert names == {
            "manifest.json",
            "mp_rank_00_model_states.pt",
            f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        }
        assert (tmp_path / str(rank) / "latest").exists()


def save_on_own_storage(rank: int, folder: Path) -> None:
    import deepspeed
    from tests.helpers import checkpointing

    model = checkpointing.Net()
    settings = {**checkpointing.config(1, "fp32"), "checkpoint": {"use_node_local_storage": True}}
    made = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[
        0
    ]
    made.local_rank = 0
    train(made, 0, 1, rank, 2)
    made.save_checkpoint(folder / str(rank), tag="t")
    before = state_of(made)
    made.load_checkpoint(folder / str(rank))
    assert same(state_of(made), before) == []


@pytest.mark.parametrize("stage", [1, 2])
def test_whole_states_can_be_read_and_set_on_two_ranks(stage: int, ranks2: Any) -> None:
    for rank in ranks2.run(read_and_set, stage):
        assert rank == []


def read_and_set(rank: int, stage: int) -> list[str]:
    """Names of what is not as a plain optimizer would have it."""
    from deepspeed.utils.tensor_fragment import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
    )

    wrong = []
    made = engine(stage, "fp32")
    train(made, 0, 2, rank, 2)
    x = torch.arange(8) % 7
    made.backward(made(x, x))
    torch.manual_seed(3)
    for name, param in made.module.named_parameters():
        if safe_get_full_grad(param).shape != param.shape:
            wrong.append(f"gradient of {name}")
        if not torch.equal(safe_get_full_fp32_param(param), param):
            wrong.append(f"master of {name}")
        gradient, moment, value = (torch.randn(param.shape) for _ in range(3))
        gradient *= 1e-3  # below the default clipping norm of 1
        safe_set_full_grad(param, gradient)
        safe_set_full_optimizer_state(param, moment, "exp_avg")
        safe_set_full_fp32_param(param, value)
        if not torch.equal(safe_get_full_grad(param), gradient):
            wrong.append(f"set gradient of {name}")
        if not torch.equal(safe_get_full_optimizer_state(param, "exp_avg"), moment):
            wrong.append(f"set moment of {name}")
        if not torch.equal(safe_get_full_fp32_param(param), value) or not torch.equal(param, value):
            wrong.append(f"set master of {name}")
        squares = safe_get_full_optimizer_state(param, "exp_avg_sq")
        group = made.optimizer.param_groups[int(param.ndim <= 1)]
        lr, (b1, b2), step = group["lr"], group["betas"], 3
        mean = (b1 * moment + (1 - b1) * gradient) / (1 - b1**step)
        root = ((b2 * squares + (1 - b2) * gradient**2) / (1 - b2**step)).sqrt() + group["eps"]
        param.expected = value * (1 - lr * group["weight_decay"]) - lr * mean / root
    made.step()
    for name, param in made.module.named_parameters():
        # a handful of fp32 roundings in another order than torch's
        if not torch.allclose(param, param.expected, rtol=1e-5, atol=1e-6):
            wrong.append(f"step of {name}")
    return wrong
