# SPDX-License-Identifier: Apache-2.0
"""The stand-alone exporter: right weights from every stage and number of ranks, and nothing from bad files."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.runtime.zero.layout import Layout
from deepspeed.utils import zero_to_fp32
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
)
from tests.helpers.checkpointing import SAVE_AT, Net, engine, state_of, train

GOLDEN = Path(__file__).parents[2] / "contract" / "golden"
SHAPES = [
    OrderedDict(
        a=torch.Size([3, 5]), b=torch.Size([7]), empty=torch.Size([0, 4]), scalar=torch.Size([])
    ),
    OrderedDict(c=torch.Size([2, 2, 2]), d=torch.Size([1])),
]


def weights() -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        (n, torch.randn(s, generator=generator)) for g in SHAPES for n, s in g.items()
    )


def make(folder: Path, stage: int, world: int) -> OrderedDict[str, torch.Tensor]:
    """A checkpoint as `world` ranks would save it, cut by hand; returns its weights."""
    full, tag = weights(), folder / "t"
    tag.mkdir(parents=True)
    flats: list[list[torch.Tensor]] = [[] for _ in range(world)]
    paddings: list[list[int]] = [[] for _ in range(world)]
    for group in SHAPES:
        numels = [shape.numel() for shape in group.values()]
        layout = Layout.per_param(numels, world) if stage == 3 else Layout.contiguous(numels, world)
        for rank in range(world):
            shard = torch.zeros(layout.shard_numel)
            for s in layout.segments(rank):
                source = full[list(group)[s.param]].flatten()
                shard[s.shard_start : s.shard_start + s.length] = source[
                    s.param_start : s.param_start + s.length
                ]
            padding = 0 if stage == 3 else layout.padding(rank)
            flats[rank].append(shard[: shard.numel() - padding])
            paddings[rank].append(padding)
    for rank in range(world):
        state: dict[str, Any] = {
            "zero_stage": stage,
            "partition_count": world if stage == 3 else [world] * 2,
        }
        state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] = flats[rank]
        state["group_paddings"] = paddings[rank]
        torch.save(
            {"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    buffers = {"count": torch.tensor(3), "low": torch.ones(2, dtype=torch.bfloat16)}
    frozen = torch.arange(5.0)
    for rank in range(world if stage == 3 else 1):
        piece = -(-5 // world)
        padded = torch.cat([frozen, torch.zeros(piece * world - 5)])
        model = {
            "module": {**buffers, **{name: torch.zeros(0) for name in full}},
            "buffer_names": list(buffers),
            "param_shapes": SHAPES,
            "frozen_param_shapes": OrderedDict(frozen=torch.Size([5])),
            "frozen_param_fragments": {
                "frozen": padded.chunk(world)[rank] if stage == 3 else frozen
            },
            "shared_params": {"tied": "a"},
            "ds_version": "0.19.8",
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        torch.save(model, tag / f"{name}_model_states.pt")
    (folder / "latest").write_text("t", encoding="utf-8")
    return OrderedDict(
        full, frozen=frozen, tied=full["a"], count=torch.tensor(3.0), low=torch.ones(2)
    )


@pytest.mark.parametrize("world", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_come_out_as_they_went_in(stage: int, world: int, tmp_path: Path) -> None:
    expected = make(tmp_path, stage, world)
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == torch.float32, name
        assert found[name].shape == value.shape
    assert found["tied"] is found["a"]
    trained = get_fp32_state_dict_from_zero_checkpoint(tmp_path, exclude_frozen_parameters=True)
    assert set(expected) - set(trained) == {"frozen"}


@pytest.mark.parametrize("data_first", [False, True])
def test_experts_are_taken_from_the_ranks_that_hold_them(data_first: bool, tmp_path: Path) -> None:
    # 2 x 2 ranks: each expert on two of them, which are neighbours or not
    shape, local = torch.Size([3, 2]), "moe.deepspeed_moe.experts.deepspeed_experts.0.w"
    experts = [torch.arange(6.0).view(shape) + 10 * expert for expert in range(2)]
    for rank in range(4):
        expert, part = divmod(rank, 2) if data_first else (rank % 2, rank // 2)
        flat = torch.cat([experts[expert].flatten(), torch.zeros(2)])[4 * part : 4 * part + 4]
        state = {
            "zero_stage": 1,
            "partition_count": [4, 2],
            "single_partition_of_fp32_groups": [torch.full((2,), float(rank)), flat],
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, tmp_path / name)
    model = {
        "module": {"moe._extra_state": {"calls": 3}},
        "buffer_names": [],
        "param_shapes": [{"dense": torch.Size([8])}, {local: shape}],
        "ds_config": {"use_data_before_expert_parallelism": data_first},
    }
    torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path.parent, tmp_path.name)
    assert found.pop("dense").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(found) == [local, local.replace(".0.", ".1.")]
    for expert, name in zip(experts, sorted(found), strict=True):
        assert torch.equal(found[name], expert)


def test_lazy_weights_tell_their_shape_and_are_made_when_asked(tmp_path: Path) -> None:
    expected = make(tmp_path, 2, 2)
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path, lazy_mode=True)
    assert found["a"].shape == torch.Size([3, 5]) and found["a"].dtype == torch.float32
    assert torch.equal(found["a"].contiguous(), expected["a"])


@pytest.mark.parametrize("name", ["s1_fp32_w2", "s2_bf16_w2", "s2_fp32_w2_frozen", "s3_fp32_w2"])
def test_recorded_checkpoints_give_the_recorded_weights(name: str) -> None:
    expected = torch.load(GOLDEN / name / "fp32.pt", weights_only=True)
    found = get_fp32_state_dict_from_zero_checkpoint(GOLDEN / name)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    metadata, found = header.pop("__metadata__"), {}
    end = 0
    for name, entry in header.items():
        begin, finish = entry["data_offsets"]
        assert entry["dtype"] == "F32" and begin == end
        values = torch.frombuffer(
            bytearray(data[8 + length + begin : 8 + length + finish] or b"0000"),
            dtype=torch.float32,
        )
        found[name] = values[: (finish - begin) // 4].view(entry["shape"])
        end = finish
    assert len(data) == 8 + length + end
    return found, metadata


@pytest.mark.parametrize("limit", [None, "5GB", "100B", 60, "1KiB"])
@pytest.mark.parametrize("safe", [True, False])
def test_files_hold_every_weight_once_and_the_index_says_where(
    safe: bool, limit: Any, tmp_path: Path
) -> None:
    expected = make(tmp_path / "in", 2, 3)
    out = tmp_path / "out"
    convert_zero_checkpoint_to_fp32_state_dict(
        tmp_path / "in", out, max_shard_size=limit, safe_serialization=safe
    )
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    files = sorted(p.name for p in out.glob(f"*.{suffix}"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if safe:
            part, metadata = read_safetensors(out / file)
            assert metadata == {"format": "pt"}
        else:
            part = torch.load(out / file, weights_only=True)
        assert not set(part) & set(found)
        found.update(part)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    index = out / f"{stem}.{suffix}.index.json"
    if limit in ("100B", 60):
        assert files == [
            f"{stem}-{i:05d}-of-{len(files):05d}.{suffix}" for i in range(1, len(files) + 1)
        ]
        content = json.loads(index.read_text(encoding="utf-8"))
        assert set(content["weight_map"]) == set(expected) and set(
            content["weight_map"].values()
        ) == set(files)
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        assert index.read_bytes() == text.encode()
    else:
        assert files == [f"{stem}.{suffix}"] and not index.exists()


def test_ranks_that_write_the_same_files_at_once_leave_them_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, output = make(tmp_path / "in", 2, 2), tmp_path / "out"
    write, ranks = zero_to_fp32._write_torch, iter([os.getpid() + 1])

    def write_while_another_rank_does(path: Path, some: Any) -> None:
        write(path, some)
        for other in ranks:
            with monkeypatch.context() as patched:
                patched.setattr(zero_to_fp32.os, "getpid", lambda other=other: other)
                convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "in", output, 80, tag="t")

    monkeypatch.setattr(zero_to_fp32, "_write_torch", write_while_another_rank_does)
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "in", output, 80, tag="t")
    assert not list(output.glob("*.tmp"))
    index = json.loads((output / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    for name, file in index["weight_map"].items():
        assert torch.equal(torch.load(output / file, weights_only=True)[name], full[name])


def test_safetensors_of_others_read_our_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    expected = make(tmp_path / "in", 3, 2)
    convert_zero_checkpoint_to_fp32_state_dict(
        tmp_path / "in", tmp_path / "out", safe_serialization=True
    )
    found = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("size", "number"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2KiB", 2048), ("7", 7), (9, 9), ("1tb", 10**12)],
)
def test_sizes_are_read(size: Any, number: int) -> None:
    assert zero_to_fp32._bytes(size) == number


@pytest.mark.parametrize("size", ["", "GB", "5XB", "-1GB"])
def test_sizes_that_mean_nothing_are_refused(size: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        zero_to_fp32._bytes(size)


@pytest.mark.parametrize("stage", [1, 2])
def test_our_own_checkpoint_gives_the_masters(stage: int, tmp_path: Path) -> None:
    made = engine(stage, "bf16", frozen=True)
    train(made, 0, SAVE_AT)
    made.save_checkpoint(tmp_path)
    state = state_of(made)
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert set(found) == set(made.module.state_dict())
    for name in map(str, made.param_names.values()):
        assert torch.equal(found[name], state.get(f"{name}.master", state[name].float())), name
    assert get_model_state_file(tmp_path / "global_step3", stage).endswith(
        "mp_rank_00_model_states.pt"
    )
    assert len(get_optim_files(str(tmp_path / "global_step3"))) == 1
    plain = load_state_dict_from_zero_checkpoint(Net(), tmp_path)
    assert torch.equal(plain.head.weight, state["head.weight.master"])


def test_a_model_that_stage_3_sharded_takes_the_masters_and_is_whole(tmp_path: Path) -> None:
    made = engine(3, "bf16")
    train(made, 0, SAVE_AT)
    made.save_checkpoint(tmp_path)
    wanted = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    found = load_state_dict_from_zero_checkpoint(made.module, tmp_path)
    for name, param in found.named_parameters():
        assert torch.equal(param, wanted[name].bfloat16()), name
        assert param.ds_status.name == "AVAILABLE"  # as it says of itself, and item() believes


def test_the_copied_script_runs_by_itself(tmp_path: Path) -> None:
    made = engine(2, "bf16")
    made.save_checkpoint(tmp_path)
    script = tmp_path / "zero_to_fp32.py"
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not [m for m in sys.modules if m.startswith('deepspeed')], 'it imported the package'"
    )
    command = [sys.executable, "-c", code, str(script), ".", "out", "--safe_serialization"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    found, _ = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["head.weight"], state_of(made)["head.weight.master"])
    command = [sys.executable, str(script), ".", "out", "--tag", "other"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120)
    assert (
        done.returncode != 0 and "doesn't exist" in done.stderr and "Traceback" not in done.stderr
    )


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("side_effect",)


def test_hostile_and_damaged_files_give_an_error_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, 2, 1)
    shard = tmp_path / "t" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    good = torch.load(shard, weights_only=True)
    torch.save({**good, "x": Payload()}, shard)
    with pytest.raises(ValueError, match="refused"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert not (tmp_path / "side_effect").exists()
    with pytest.raises(ValueError, match="does not name a folder"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag="../x")


def test_shards_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    make(tmp_path, 2, 3)
    (tmp_path / "t" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="Expected 3 of"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    make(tmp_path / "b", 3, 2)
    for path in (tmp_path / "b" / "t").glob("*optim*"):
        saved = torch.load(path, weights_only=True)
        saved["optimizer_state_dict"]["fp32_flat_groups"][1] = torch.zeros(9)
        torch.save(saved, path)
    with pytest.raises(ValueError, match="something is wrong|shards end|cut"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path / "b")


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    engine(1, "fp32").save_checkpoint(tmp_path)
    path = next((tmp_path / "global_step0").glob("*optim*"))
    data = bytearray(path.read_bytes())
    data[-200] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latest"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="doesn't exist"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag="t")


def test_giving_pages_back_changes_nothing(tmp_path: Path) -> None:
    values = torch.randn(600_000)
    torch.save({"x": values}, tmp_path / "x.pt")
    mapped = torch.load(tmp_path / "x.pt", mmap=True, weights_only=True)["x"]
    for source in (mapped, values.clone()):  # of a file, and of no file
        weight = zero_to_fp32.Weight((600_000,), [(source, 0, 300_001), (source, 300_001, 299_999)])
        for _ in range(2):
            assert torch.equal(weight.contiguous(), values)
        assert torch.equal(source, values)
