# SPDX-License-Identifier: Apache-2.0
"""Universal checkpoints: what goes in comes out at any stage, and slices of tensor-parallel ranks are put together."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint import SubparamShape, enable_universal_checkpoint, to_upstream
from deepspeed.checkpoint.ds_to_universal import convert, main, parse_arguments
from deepspeed.checkpoint.fragments import merge_tp_slices
from deepspeed.checkpoint.merge_slices import MergeRules
from deepspeed.checkpoint.reader import load_file
from deepspeed.checkpoint.universal_checkpoint import cut_for_rank
from deepspeed.checkpoint.writer import save_file
from deepspeed.utils.errors import DeepSpeedCheckpointError
from tests.helpers.checkpointing import SAVE_AT, STEPS, engine, same, state_of, train

GOLDEN = Path(__file__).parents[2] / "contract" / "golden"
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def saved(folder: Path, stage: int, dtype: str, **options: Any) -> tuple[dict, list[float]]:
    made = engine(stage, dtype, **options)
    train(made, 0, SAVE_AT)
    made.save_checkpoint(folder, tag="t", client_state={"mine": 5})
    convert(folder / "t", folder / "u")
    return state_of(made), train(made, SAVE_AT, STEPS)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "fp16"), (3, "bf16")]
)
def test_a_run_goes_on_from_a_universal_folder_at_every_stage(
    stage: int, dtype: str, tmp_path: Path
) -> None:
    state, losses = saved(tmp_path, stage, dtype)
    assert (tmp_path / "latest_universal").read_text(encoding="utf-8") == "u"
    for after in (0, 1, 2, 3):
        made = engine(after, dtype, seed=9, **UNIVERSAL)
        path, client = made.load_checkpoint(tmp_path)
        assert path is not None and client["mine"] == 5 and made.global_steps == SAVE_AT
        now = state_of(made)
        common = set(now) & set(state)
        assert len([key for key in common if key.endswith("exp_avg_sq")]) == 6
        states = (".master", ".exp_avg", ".exp_avg_sq")
        whole = after < 3 and stage < 3  # stage 3 shows no whole weight outside of a gather
        keys = [key for key in common if whole or key.endswith(states)]
        assert same({k: state[k] for k in keys}, {k: now[k] for k in keys}) == []
        # stages 0 and above step tensors of other sizes, whose last elements torch rounds otherwise
        rel = 0 if dtype != "fp32" and after == stage else (1e-6 if dtype == "fp32" else 2e-2)
        assert train(made, SAVE_AT, STEPS) == pytest.approx(losses, rel=rel, abs=0)


def reads_sets(folder: Path) -> bool:
    """Safe loaders before torch 2.6 know no sets."""
    torch.save({"a"}, folder / "set")
    try:
        return torch.load(folder / "set", weights_only=True) == {"a"}
    except pickle.UnpicklingError:
        return False


def test_every_file_reads_without_running_anything(tmp_path: Path) -> None:
    saved(tmp_path, 3, "bf16")
    files = sorted((tmp_path / "u").rglob("*.pt"))
    assert len(files) == 6 * 4 + 3
    if not reads_sets(tmp_path):
        files = [f for f in files if "model_states" not in f.name]  # those hold names in a set
    for file in files:
        torch.load(file, weights_only=True)
    one = torch.load(tmp_path / "u" / "zero" / "fc.weight" / "exp_avg.pt", weights_only=True)
    assert one["param"].shape == (6, 5) and one["cat_dim"] == 0
    assert float(torch.load(tmp_path / "u/zero/fc.weight/step.pt", weights_only=True)) == SAVE_AT


@pytest.mark.parametrize("name", ["s1_fp32_w2", "s2_bf16_w2", "s2_fp32_w2_frozen", "s3_fp32_w2"])
def test_upstreams_checkpoints_convert(name: str, tmp_path: Path) -> None:
    convert(GOLDEN / name / "t", tmp_path / "u")
    whole = torch.load(GOLDEN / name / "fp32.pt", weights_only=True)
    trained = [p.parent.name for p in (tmp_path / "u").glob("zero/*/exp_avg.pt")]
    assert len(trained) == (5 if "frozen" in name else 6)
    for param in trained:
        content = torch.load(tmp_path / "u" / "zero" / param / "fp32.pt", weights_only=True)
        assert torch.equal(content["param"], whole[param])
    model = torch.load(tmp_path / "u" / "mp_rank_00_model_states.pt", weights_only=True)
    if "frozen" in name:
        assert torch.equal(model["module"]["fc.weight"].float(), whole["fc.weight"])


def test_damage_and_absence_are_errors(tmp_path: Path) -> None:
    saved(tmp_path, 1, "fp32")
    path = tmp_path / "u" / "zero" / "fc.weight" / "fp32.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    made = engine(1, "fp32", **UNIVERSAL)
    with pytest.raises(DeepSpeedCheckpointError, match=r"fc\.weight"):
        made.load_checkpoint(tmp_path)
    with pytest.raises(DeepSpeedCheckpointError, match="no universal checkpoint"):
        made.load_checkpoint(tmp_path, tag="t")
    (tmp_path / "latest_universal").unlink()
    with pytest.raises(ValueError, match="latest_universal"):
        made.load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model states"):
        convert(tmp_path / "t.old", tmp_path / "v")


def test_a_parameter_takes_its_state_from_its_folder(tmp_path: Path) -> None:
    state, _ = saved(tmp_path, 2, "bf16")
    made = engine(2, "bf16", seed=9)
    train(made, 0, 1)
    params = [p for p in made.param_names if p.requires_grad]
    enable_universal_checkpoint(params)
    for param in params:
        folder = tmp_path / "u" / "zero" / made.param_names[param]
        assert float(param.load_hp_checkpoint_state(folder, 0, 1)) == SAVE_AT
    assert same(state_of(made), state) == []


def test_the_command_line(tmp_path: Path) -> None:
    base = ["--input_folder", str(GOLDEN / "s1_fp32_w2" / "t"), "--output_folder"]
    args = parse_arguments([*base, str(tmp_path / "a"), "--keep_temp_folder", "--no_strict"])
    assert (args.num_extract_workers, args.num_merge_workers, args.strict) == (4, 2, False)
    main(args)
    assert (tmp_path / "a" / "zero" / "optimizer_state.pt").is_file()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(tmp_path / "nothing"), "--output_folder", str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1 and "ds_to_universal: there are no model states" in done.stderr


# - slices of tensor-parallel ranks

INFO: dict[str, Any] = {
    "tp_replicated_parameter_patterns": [r"norm\."],
    "parameter_to_average_patterns": [r".*average"],
    "parameter_with_row_parallelism_patterns": [r".*row"],
    "vocabulary_parameter_patterns": [r"embed"],
    "original_vocab_size": 7,
    "parameter_with_2_sub_params_cat_dim_0": [r".*gate_up"],
    "parameter_with_sub_params": [
        {"patterns": [r".*qkv"], "shape": ((8, 4, 4), 3), "partition_dim": 0}
    ],
}


@pytest.mark.parametrize("name", ["plain", "a.row", "embed", "gate_up", "a.qkv", "norm.weight"])
def test_slices_join_and_are_cut_again(name: str) -> None:
    torch.manual_seed(0)
    rows = {"embed": 8, "a.qkv": 16}.get(name, 8)
    whole = torch.randn(rows, 4 if name == "a.row" else 3)
    if name == "embed":
        whole[7:] = 0  # a vocabulary of 7, padded
    qkv, halves = whole.split([8, 4, 4]) if name == "a.qkv" else (), whole.chunk(2)
    slices = {
        "a.row": list(whole.chunk(2, 1)),
        "gate_up": [torch.cat([half.chunk(2)[t] for half in halves]) for t in (0, 1)],
        "a.qkv": [torch.cat([part.chunk(2)[t] for part in qkv]) for t in (0, 1)] if qkv else [],
        "norm.weight": [whole, whole],
    }.get(name, list(halves))
    rules = MergeRules(INFO)
    saved = rules.merge(name, slices)
    wanted = whole[:7] if name == "embed" else whole
    assert torch.equal(saved["param"], wanted)
    for rank in (0, 1):
        assert torch.equal(cut_for_rank(saved, rank, 2, slices[rank].shape), slices[rank])


def test_rules_that_do_not_hold_are_errors() -> None:
    rules = MergeRules(INFO)
    with pytest.raises(DeepSpeedCheckpointError, match="not equal"):
        rules.merge("norm.bias", [torch.ones(2), torch.zeros(2)])
    assert torch.equal(
        rules.merge("an_average", [torch.ones(2), torch.zeros(2)])["param"], torch.full((2,), 0.5)
    )
    assert r"embed" in rules.unmatched() and r"norm\." not in rules.unmatched()
    with pytest.raises(ValueError, match="cannot be put together"):
        MergeRules({"autotp_unsupported_parameter_patterns": ["x"]})
    with pytest.raises(DeepSpeedCheckpointError, match="cannot be cut"):
        cut_for_rank({"param": torch.ones(3, 2), "cat_dim": 0}, 0, 2)
    shape = SubparamShape([r".*"], ((2, 2), 3), 0)
    assert cut_for_rank({"param": torch.ones(4, 3), "sub_param_shape": shape}, 1, 2).shape == (2, 3)


def test_a_checkpoint_of_two_tensor_parallel_ranks_converts(tmp_path: Path) -> None:
    whole = {"a.row": torch.randn(2, 4), "plain": torch.randn(4, 2)}
    cut = {"a.row": 1, "plain": 0}
    source = tmp_path / "t"
    source.mkdir()
    for rank in (0, 1):
        part = {name: value.chunk(2, cut[name])[rank].clone() for name, value in whole.items()}
        flat = torch.cat([value.reshape(-1) for value in part.values()])
        model = {
            "module": part,
            "param_shapes": [{name: value.shape for name, value in part.items()}],
            "mp_world_size": 2,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2},
            "ds_version": "0.19.8",
        }
        shard = {
            "zero_stage": 1,
            "partition_count": [1],
            "group_paddings": [0],
            "single_partition_of_fp32_groups": [flat],
            "base_optimizer_state": {
                "state": {0: {"step": 3, "exp_avg": 2 * flat}},
                "param_groups": [{"lr": 0.1, "params": [0]}],
            },
        }
        torch.save(model, source / f"mp_rank_{rank:02d}_model_states.pt")
        torch.save(
            {"optimizer_state_dict": shard},
            source / f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt",
        )
    with pytest.raises(ValueError, match="2 tensor-parallel ranks"):
        convert(source, tmp_path / "u")
    assert not (tmp_path / "u").exists()
    for path in source.glob("mp_rank*"):
        info = {"parameter_with_row_parallelism_patterns": [".*row"]}
        held = torch.load(path, weights_only=False)  # not mapped: its file is written anew
        torch.save({**held, "universal_checkpoint_info": info}, path)
    convert(source, tmp_path / "u")
    for name, value in whole.items():
        for state, factor in (("fp32", 1), ("exp_avg", 2)):
            file = tmp_path / "u" / "zero" / name / f"{state}.pt"
            assert torch.equal(torch.load(file, weights_only=True)["param"], factor * value)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_copy_for_upstream_holds_a_scaler_and_loads_here_too(dtype: str, tmp_path: Path) -> None:
    made = engine(3, dtype)
    train(made, 0, SAVE_AT)
    made.save_checkpoint(tmp_path / "ours", tag="t")
    losses = train(made, SAVE_AT, STEPS)
    command = ["--input_folder", str(tmp_path / "ours" / "t")]
    to_upstream.main([*command, "--output_folder", str(tmp_path / "theirs" / "t")])
    shard = tmp_path / "theirs" / "t" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    scaler = torch.load(shard, weights_only=False)["optimizer_state_dict"]["loss_scaler"]
    assert type(scaler).__name__ == ("DynamicLossScaler" if dtype == "fp16" else "LossScaler")
    assert scaler.cur_scale >= 1 and type(scaler).__module__.endswith("fp16.loss_scaler")
    other = engine(3, dtype, seed=9)
    other.load_checkpoint(tmp_path / "theirs")
    assert train(other, SAVE_AT, STEPS) == losses


def test_fragments_join_in_the_order_of_data_ranks(tmp_path: Path) -> None:
    whole = torch.arange(2 * 12.0).view(4, 6)  # twelve data ranks have an element of each half
    for tensor_rank, half in enumerate(whole.view(2, 12)):
        folder = tmp_path / "slices" / "fc.weight" / str(tensor_rank)
        folder.mkdir(parents=True)
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            for data_rank, piece in enumerate(half):
                save_file(folder / f"{state}.{data_rank}", piece.reshape(1).clone())
    shape = torch.Size([2, 6])
    unmatched = merge_tp_slices({}, tmp_path / "out", tmp_path / "slices", 2, ("fc.weight", shape))
    assert unmatched == set()
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        joined = load_file(tmp_path / "out" / "fc.weight" / f"{state}.pt")
        assert torch.equal(joined["param"], whole)
