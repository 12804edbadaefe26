# SPDX-License-Identifier: Apache-2.0
"""Folding a checkpoint's grid of ranks: every shard goes to exactly one place, and flat tensors come out end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint import (
    DeepSpeedCheckpoint,
    ZeROCheckpoint,
    get_model_3d_descriptor,
    merge_state,
    model_3d_desc,
    reshape_meg_2d_parallel,
)
from deepspeed.checkpoint.autoep_metadata import aggregate_autoep_metadata, refuse_folded
from deepspeed.checkpoint.reshape_meg_2d import get_mpu_ranks

GOLDEN = Path(__file__).parents[2] / "contract" / "golden"


def test_a_grid_folds_neighbours_of_a_stage_then_stages():
    # recorded from upstream 0.19.8
    assert reshape_meg_2d_parallel(2, 4, 2, 2).map == {
        "0,0": [0, 1],
        "0,1": [2, 3],
        "1,0": [4, 5],
        "1,1": [6, 7],
    }
    assert reshape_meg_2d_parallel(4, 2, 2, 1).map == {"0,0": [0, 1, 2, 3], "1,0": [4, 5, 6, 7]}
    assert get_mpu_ranks(2, 2, 2) == (
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 1, 4, 5], [2, 3, 6, 7]],
        [[0, 2], [1, 3], [4, 6], [5, 7]],
    )


@pytest.mark.parametrize(
    ("source", "target", "maps"),
    [
        ((1, 1, 4), (1, 1, 2), [{"0,0": [0, 1]}, {"0,0": [2, 3]}]),
        ((2, 2, 2), (1, 2, 1), [{"0,0": [0, 4, 2, 6], "0,1": [1, 5, 3, 7]}]),
        ((2, 2, 2), (1, 1, 1), [{"0,0": [0, 4, 1, 5, 2, 6, 3, 7]}]),
        ((2, 1, 2), (1, 1, 2), [{"0,0": [0, 2]}, {"0,0": [1, 3]}]),
    ],
)
def test_shards_are_given_out_as_upstream_does(source, target, maps):
    made = model_3d_desc(*source).reshape(model_3d_desc(*target))
    assert [grid.map for grid in made] == maps


def test_larger_and_indivisible_targets_are_refused():
    with pytest.raises(AssertionError, match=r"Expansion reshape not supported - DP: 2 ---> 4"):
        model_3d_desc(1, 1, 2).reshape(model_3d_desc(1, 1, 4))
    with pytest.raises(AssertionError, match="equal parts"):
        model_3d_desc(1, 1, 4).reshape(model_3d_desc(1, 1, 3))
    assert model_3d_desc(1, 1, 4).is_valid(0, 0, 3) == (True, [])
    assert not model_3d_desc(1, 1, 4).is_valid(0, 0, 4)[0]


def test_states_join_end_to_end():
    one = {"a": torch.ones(2), "b": [torch.zeros(1)], "n": 3, "s": torch.tensor(4.0)}
    two = {"a": torch.zeros(1), "b": [torch.ones(2)], "n": 4, "s": torch.tensor(5.0), "x": 1}
    joined = merge_state(one, two)
    assert joined["a"].tolist() == [1, 1, 0] and joined["b"][0].tolist() == [0, 1, 1]
    assert joined["n"] == 3 and joined["s"] == 4 and joined["x"] == 1
    with pytest.raises(ValueError, match="different lengths"):
        merge_state([1], [1, 2])
    with pytest.raises(ValueError, match="types"):
        merge_state({"a": 1}, {"a": "x"})


def test_shards_of_two_ranks_are_read_as_one():
    folder = GOLDEN / "s1_fp32_w2" / "t"
    assert get_model_3d_descriptor(folder).get_desc() == "PP,TP,DP = (1, 1, 2)"
    shards = ZeROCheckpoint(folder)
    assert [Path(p).name for p in shards.get_files_for_rank(0, 0, 1)] == [
        "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    ]
    whole = torch.load(folder.parent / "fp32.pt", weights_only=True)
    read = DeepSpeedCheckpoint(folder, dp_degree=1)
    assert read.is_change_dp_degree() and not read.is_change_tp_degree()
    state = read.get_zero_checkpoint_state(0, 0, 0)["optimizer_state_dict"]
    shapes = read.get_2d_parallel_state(0, 0)["param_shapes"]
    assert state["partition_count"] == [1] * len(shapes)
    for group, flat in zip(shapes, state["single_partition_of_fp32_groups"], strict=True):
        want = torch.cat([whole[name].reshape(-1) for name in group])
        assert torch.equal(flat, want)
    moments = [entry["exp_avg"] for entry in state["base_optimizer_state"]["state"].values()]
    assert [m.numel() for m in moments] == [
        f.numel() for f in state["single_partition_of_fp32_groups"]
    ]


def test_layer_files_of_a_pipeline_are_found_by_place(tmp_path):
    torch.save({"optimizer_state_dict": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for rank in range(2):
        model = {
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2},
            "iteration": 7,
        }
        torch.save(model, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
        for layer in ("01", "03", "04", "06"):
            content = {
                "attention.dense.weight": torch.full((2, 3), float(rank)),
                "mlp.weight": torch.full((2, 3), float(rank)),
                "input_layernorm.weight": torch.ones(3),
            }
            torch.save(content, tmp_path / f"layer_{layer}-model_{rank:02d}-model_states.pt")
    torch.save({"optimizer_state_dict": {}}, tmp_path / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    read = DeepSpeedCheckpoint(tmp_path, tp_degree=1)
    assert read.get_iteration() == 7
    assert read.get_embedding_layer_id() == "layer_01"
    assert read.get_final_norm_layer_id() == "layer_06"
    assert read.get_pp_transformer_map(0) == ["layer_03", "layer_04"]
    first, second = read.get_transformer_state(0, 0)
    assert first["attention.dense.weight"].shape == (2, 6) and second["mlp.weight"].shape == (4, 3)
    assert first["input_layernorm.weight"].shape == (3,)
    with pytest.raises(AssertionError, match="bogus"):
        DeepSpeedCheckpoint(GOLDEN / "s3_fp32_w2" / "t")


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ([None, None], None),
        ([(2, 1), None], "missing from model-state files"),
        ([(2, 1), (1, 2)], "disagrees across model-state files"),
    ],
)
def test_files_of_model_states_agree_on_the_degrees(
    said: list[tuple[int, int] | None], wrong: str | None, tmp_path: Path
) -> None:
    for rank, degrees in enumerate(said):
        model = {"module": {}, "param_shapes": [{}]}
        if degrees is not None:
            pair = dict(zip(("pp_degree", "tp_degree"), degrees, strict=True))
            model["checkpoint_parallel_dimensions"] = pair  # type: ignore[assignment]
        torch.save(model, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
        for data_rank in range(2):
            name = f"zero_pp_rank_{data_rank}_mp_rank_{rank:02d}_optim_states.pt"
            torch.save({}, tmp_path / name)
    if wrong is None:  # no pipeline's layers: the files are of tensor-parallel ranks
        assert get_model_3d_descriptor(tmp_path).get_desc() == "PP,TP,DP = (1, 2, 2)"
        return
    with pytest.raises(RuntimeError, match=wrong):
        get_model_3d_descriptor(tmp_path)


def test_the_entries_of_split_experts_are_those_of_all_files() -> None:
    entry = {"module_path": "layers.3.mlp", "num_experts": 4}
    models: list[dict[str, Any]] = [{"ds_autoep_layers": [entry]}, {"autoep_layers": [entry]}, {}]
    assert aggregate_autoep_metadata(models) == [entry]
    with pytest.raises(RuntimeError, match="must be a list"):
        aggregate_autoep_metadata([{"ds_autoep_layers": {"no": "list"}}])
    refuse_folded(models)
    with pytest.raises(NotImplementedError, match="folded"):
        refuse_folded([*models, {"folding": {"tp_size": 2}}])
