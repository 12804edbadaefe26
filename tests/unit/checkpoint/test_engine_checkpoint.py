# SPDX-License-Identifier: Apache-2.0
"""What one process saves it resumes bit for bit, at any stage; and what load_checkpoint promises besides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.checkpoint.reader import load_file
from deepspeed.utils.errors import DeepSpeedCheckpointError
from tests.helpers.checkpointing import SAVE_AT, STEPS, Net, config, engine, same, state_of, train
from tests.helpers.plain import check_plain

GOLDEN = Path(__file__).parents[2] / "contract" / "golden"
DTYPES = ["fp32", "bf16", "fp16"]
NATIVE = {"adam": {"torch_adam": False}}
OFFLOADS: dict[str, dict[str, Any]] = {
    "device": {},
    "native": NATIVE,
    "cpu": {"zero": {"offload_optimizer": {"device": "cpu"}}, **NATIVE},
    "part": {"zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.6}}, **NATIVE},
    "round_robin": {"zero": {"round_robin_gradients": True}},
}


def checkpoint(
    folder: Path, stage: int, dtype: str, **options: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Train, save, and give the engine and its state at the save."""
    made = engine(stage, dtype, **options)
    train(made, 0, SAVE_AT)
    assert made.save_checkpoint(folder, client_state={"mine": 5}) is True
    return made, state_of(made)


@pytest.mark.parametrize("where", OFFLOADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_run_continues_bit_for_bit(
    stage: int, dtype: str, where: str, tmp_path: Path
) -> None:
    options = OFFLOADS[where]
    if stage == 0 and where == "part":
        pytest.skip("a partial ratio needs a sharded optimizer")
    first, at_save = checkpoint(tmp_path, stage, dtype, **options)
    expected = train(first, SAVE_AT, STEPS)
    second = engine(stage, dtype, seed=9, **options)
    path, client_state = second.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step3" / "mp_rank_00_model_states.pt")
    assert client_state["mine"] == 5
    assert same(state_of(second), at_save) == []
    assert (second.global_steps, second.global_samples, second.micro_steps) == (3, 24, 0)
    assert train(second, SAVE_AT, STEPS) == expected
    assert same(state_of(second), state_of(first)) == []
    assert second.get_lr() == first.get_lr()
    assert getattr(second.optimizer, "loss_scale", None) == getattr(
        first.optimizer, "loss_scale", None
    )


@pytest.mark.parametrize("where", ["device", "native", "part"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_running_engine_loads_into_the_memory_that_it_has(
    stage: int, where: str, tmp_path: Path
) -> None:
    if stage == 3 and where == "part":
        pytest.skip("a partial ratio is of stages 1 and 2")
    options = OFFLOADS[where]
    first, at_save = checkpoint(tmp_path, stage, "bf16", **options)
    expected = train(first, SAVE_AT, STEPS)
    second = engine(stage, "bf16", seed=9, **options)
    train(second, 0, SAVE_AT)

    def addresses() -> list[int]:
        states = second.optimizer.optimizer.state
        masters = [part.master for group in second.optimizer.groups for part in group.parts]
        return [
            tensor.data_ptr()
            for master in masters
            for tensor in (master, states[master]["exp_avg"], states[master]["exp_avg_sq"])
        ]

    before = addresses()
    second.load_checkpoint(tmp_path)
    assert addresses() == before
    assert same(state_of(second), at_save) == []
    second.save_checkpoint(tmp_path, tag="again")
    assert train(second, SAVE_AT, STEPS) == expected
    assert same(state_of(second), state_of(first)) == []
    third = engine(stage, "bf16", seed=2, **options)
    third.load_checkpoint(tmp_path, tag="again")
    assert same(state_of(third), at_save) == []


def test_a_loss_scale_and_its_hysteresis_are_resumed(tmp_path: Path) -> None:
    first, _ = checkpoint(tmp_path, 2, "fp16")
    # two clean steps double a scale of 2**6
    assert first.optimizer.loss_scale > 2.0**6
    second = engine(2, "fp16", seed=1)
    second.load_checkpoint(tmp_path)
    assert second.optimizer.loss_scale == first.optimizer.loss_scale
    assert second.optimizer.loss_scaler.state_dict() == first.optimizer.loss_scaler.state_dict()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_any_stage_resumes_from_any_other(
    before: int, after: int, dtype: str, tmp_path: Path
) -> None:
    first, at_save = checkpoint(tmp_path, before, dtype)
    expected = train(first, SAVE_AT, STEPS)
    second = engine(after, dtype, seed=9)
    second.load_checkpoint(tmp_path)
    loaded = state_of(second)
    common = set(loaded) & set(at_save)  # fp32 stage 0 has no masters of its own
    assert same({k: loaded[k] for k in common}, {k: at_save[k] for k in common}) == []
    assert len([key for key in common if key.endswith("exp_avg_sq")]) == 6
    # torch's AdamW rounds the last elements of a tensor otherwise than a whole vector: in fp32 stage 0 steps each
    # parameter by itself, the others one flat tensor, so bits may differ where those meet
    exact = dtype != "fp32" or (before == 0) == (after == 0)
    torch.testing.assert_close(
        train(second, SAVE_AT, STEPS), expected, rtol=0 if exact else 1e-6, atol=0
    )


@pytest.mark.parametrize("tiers", [("device", "part"), ("part", "cpu"), ("cpu", "native")])
def test_any_tier_resumes_from_any_other(tiers: tuple[str, str], tmp_path: Path) -> None:
    _, at_save = checkpoint(tmp_path, 2, "bf16", **OFFLOADS[tiers[0]])
    second = engine(2, "bf16", seed=9, **OFFLOADS[tiers[1]])
    second.load_checkpoint(tmp_path)
    assert same(state_of(second), at_save) == []
    train(second, SAVE_AT, STEPS)


@pytest.mark.parametrize(
    ("before", "after"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")]
)
def test_another_dtype_keeps_masters_and_moments(before: str, after: str, tmp_path: Path) -> None:
    _, at_save = checkpoint(tmp_path, 1, before)
    second = engine(1, after, seed=9)
    second.load_checkpoint(tmp_path)
    loaded = state_of(second)
    for name, value in at_save.items():
        if "." in name and name.rsplit(".", 1)[1] in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(loaded[name], value), name
    masters = {name: loaded[name + ".master"] for name in map(str, second.param_names.values())}
    if after == "bf16":  # weights are the rounded masters, rounded once more where fp16 lay between
        for name, value in masters.items():
            torch.testing.assert_close(loaded[name].float(), value, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "dtype", "names"),
    [
        (0, "fp32", {"mp_rank_00_model_states.pt"}),
        (0, "bf16", {"mp_rank_00_model_states.pt"}),
        (1, "fp32", {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"}),
        (2, "fp16", {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"}),
        (
            2,
            "bf16",
            {"mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"},
        ),
    ],
)
def test_files_have_the_names_and_plain_content_of_the_format(
    stage: int, dtype: str, names: set[str], tmp_path: Path
) -> None:
    checkpoint(tmp_path, stage, dtype)
    assert {p.name for p in (tmp_path / "global_step3").iterdir()} == names | {"manifest.json"}
    assert (tmp_path / "latest").read_bytes() == b"global_step3"
    assert (tmp_path / "zero_to_fp32.py").exists() == (stage > 0)
    for name in names:
        check_plain(tmp_path / "global_step3" / name)


def keys_of(value: Any, depth: int = 0) -> Any:
    """Nested keys of a saved structure, to a depth at which golden files and ours are to agree."""
    if isinstance(value, dict) and depth < 3:
        return {key: keys_of(item, depth + 1) for key, item in value.items()}
    return (
        [keys_of(item, depth + 1) for item in value]
        if type(value) is list and depth < 3
        else type(value).__name__
    )


@pytest.mark.parametrize(
    ("golden", "stage", "dtype"), [("s0_fp32_w1", 0, "fp32"), ("s0_bf16_w1", 0, "bf16")]
)
def test_model_states_have_every_key_of_the_recorded_ones(
    golden: str, stage: int, dtype: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path, stage, dtype)
    theirs = load_file(GOLDEN / golden / "t" / "mp_rank_00_model_states.pt")
    ours = load_file(tmp_path / "global_step3" / "mp_rank_00_model_states.pt")
    assert set(theirs) <= set(ours)
    assert set(theirs["optimizer"]) <= set(ours["optimizer"])
    for key in (
        "module",
        "buffer_names",
        "param_shapes",
        "shared_params",
        "lr_scheduler",
        "mine",
        "global_samples",
    ):
        assert keys_of(ours[key]) == keys_of(theirs[key]), key
    states = [
        value["optimizer"].get("optimizer_state_dict", value["optimizer"])["state"]
        for value in (ours, theirs)
    ]
    assert keys_of(states[0]) == keys_of(states[1])
    for index, state in states[1].items():
        assert state["exp_avg"].shape == states[0][index]["exp_avg"].shape


@pytest.mark.parametrize("name", ["s1_fp32_w2", "s2_bf16_w2", "s3_fp32_w2"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_recorded_checkpoints_of_two_ranks_load_into_one(name: str, stage: int) -> None:
    dtype = name.split("_")[1]
    made = engine(stage, dtype, seed=9)
    path, client_state = made.load_checkpoint(GOLDEN / name)
    assert path is not None and client_state["mine"] == 5
    weights = torch.load(GOLDEN / name / "fp32.pt", weights_only=True)
    loaded = state_of(made)
    for parameter in made.param_names.values():
        key = f"{parameter}.master" if f"{parameter}.master" in loaded else parameter
        assert torch.equal(loaded[key], weights[parameter]), parameter
        assert loaded[f"{parameter}.exp_avg_sq"].any()
    assert made.global_steps == 3 and made.loaded_checkpoint_dp_world_size == 2
    train(made, SAVE_AT, STEPS)


@pytest.mark.parametrize("name", ["s0_fp32_w1", "s0_bf16_w1"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_recorded_runs_of_one_rank_continue_bit_for_bit(
    name: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "DS_LOWP_PRODUCTS", "0"
    )  # the recorded run computed bf16 products as torch does
    dtype = name.split("_")[1]
    made = engine(stage, dtype, seed=9)
    made.load_checkpoint(GOLDEN / name)
    recorded = json.loads((GOLDEN / name / "losses.json").read_text(encoding="utf-8"))
    got = train(made, SAVE_AT, STEPS)
    # another build of torch, or another CPU, may order its sums differently
    torch.testing.assert_close(
        got, recorded[SAVE_AT:], rtol=1e-5 if dtype == "fp32" else 2e-2, atol=0
    )


# - what is loaded and what is not


def test_weights_only(tmp_path: Path) -> None:
    _, at_save = checkpoint(tmp_path, 2, "bf16")
    second = engine(2, "bf16", seed=9)
    _, client_state = second.load_checkpoint(tmp_path, load_module_only=True)
    loaded = state_of_weights(second)
    assert all(torch.equal(loaded[name], at_save[name]) for name in loaded)
    assert second.global_steps == 0
    assert {"mine", "global_steps", "lr_scheduler"} <= set(
        client_state
    ) and "module" not in client_state
    for param, name in second.param_names.items():
        master = deepspeed.utils.safe_get_full_fp32_param(param)
        assert torch.equal(master, at_save[name].float()), "masters are the 16-bit weights"


def state_of_weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: param.detach() for param, name in made.param_names.items()}


@pytest.mark.parametrize("stage", [0, 1])
def test_without_optimizer_states_masters_stay_exact_and_moments_are_fresh(
    stage: int, tmp_path: Path
) -> None:
    _, at_save = checkpoint(tmp_path, stage, "bf16")
    second = engine(stage, "bf16", seed=9)
    second.load_checkpoint(tmp_path, load_optimizer_states=False)
    for param, name in second.param_names.items():
        assert torch.equal(
            deepspeed.utils.safe_get_full_fp32_param(param), at_save[f"{name}.master"]
        )
        assert deepspeed.utils.safe_get_full_optimizer_state(param, "exp_avg") is None
    assert second.global_steps == 3


def test_without_the_scheduler_its_count_is_fresh(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, "fp32")
    second = engine(1, "fp32", seed=9)
    before = second.lr_scheduler.state_dict()
    _, client_state = second.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert second.lr_scheduler.state_dict() == before
    assert "lr_scheduler" in client_state


@pytest.mark.parametrize("stage", [0, 1])
def test_the_returned_client_state_has_the_promised_keys(stage: int, tmp_path: Path) -> None:
    checkpoint(tmp_path, stage, "fp32")
    _, client_state = engine(stage, "fp32", seed=9).load_checkpoint(tmp_path)
    kept_back = {
        "module",
        "skipped_steps",
        "global_steps",
        "dp_world_size",
        "mp_world_size",
        "data_sampler",
    }
    assert not kept_back & set(client_state)
    assert not {"random_ltd", "lr_scheduler", "sparse_tensor_module_names"} & set(client_state)
    assert {
        "mine",
        "ds_config",
        "ds_version",
        "param_shapes",
        "buffer_names",
        "global_samples",
    } <= set(client_state)
    assert ("optimizer" in client_state) == (stage == 0)


def test_client_state_is_merged_last_and_reserved_keys_are_refused(tmp_path: Path) -> None:
    made = engine(0, "fp32")
    made.save_checkpoint(tmp_path, tag="t", client_state={"ds_version": "mine"})
    assert load_file(tmp_path / "t" / "mp_rank_00_model_states.pt")["ds_version"] == "mine"
    with pytest.raises(KeyError, match="checkpoint_parallel_dimensions"):
        made.save_checkpoint(tmp_path, client_state={"checkpoint_parallel_dimensions": 1})


class Opaque:
    pass


def test_objects_in_client_state_are_warned_of_and_refused_on_load(
    tmp_path: Path, capsys: Any
) -> None:
    made = engine(0, "fp32")
    made.save_checkpoint(tmp_path, client_state={"a": [Opaque()]})
    assert "Opaque" in capsys.readouterr().out
    with pytest.raises(DeepSpeedCheckpointError, match="Opaque"):
        made.load_checkpoint(tmp_path)


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    first = engine(2, "fp32", frozen=True)
    first.save_checkpoint(tmp_path, tag="all")
    first.save_checkpoint(tmp_path, tag="trained", exclude_frozen_parameters=True)
    everything = load_file(tmp_path / "all" / "mp_rank_00_model_states.pt")
    trained = load_file(tmp_path / "trained" / "mp_rank_00_model_states.pt")
    assert set(everything["module"]) - set(trained["module"]) == {"fc.weight"}
    assert everything["frozen_param_shapes"] == {"fc.weight": torch.Size([6, 5])}
    assert torch.equal(everything["frozen_param_fragments"]["fc.weight"], first.module.fc.weight)
    assert trained["frozen_param_shapes"] is None
    second = engine(2, "fp32", seed=9, frozen=True)
    before = second.module.fc.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        second.load_checkpoint(tmp_path, tag="trained")
    second.load_checkpoint(tmp_path, tag="trained", load_module_strict=False)
    assert torch.equal(second.module.fc.weight, before)
    assert torch.equal(second.module.head.weight, first.module.head.weight)


def test_a_custom_function_loads_the_weights(tmp_path: Path) -> None:
    first, _ = checkpoint(tmp_path, 1, "fp32")
    seen = {}

    def load(src: Any, dst: Any) -> None:
        seen["module"] = dst
        dst.load_state_dict(src)

    second = engine(1, "fp32", seed=9)
    second.load_checkpoint(tmp_path, custom_load_fn=load)
    assert seen["module"] is second.module
    assert torch.equal(second.module.head.weight, first.module.head.weight)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16")])
def test_an_outside_scheduler_goes_on_driving_the_optimizer(
    stage: int, dtype: str, tmp_path: Path
) -> None:
    model = Net()
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    outside = torch.optim.lr_scheduler.LambdaLR(client, lambda step: 1.0 / (1 + step))
    settings = {**config(stage, dtype), "scheduler": {"type": None}}
    del settings["optimizer"]
    made = deepspeed.initialize(model=model, optimizer=client, config=settings)[0]
    groups = [id(group) for group in made.optimizer.param_groups]
    train(made, 0, 2)
    made.save_checkpoint(tmp_path)
    made.load_checkpoint(tmp_path)
    assert [id(group) for group in made.optimizer.param_groups] == groups
    assert [id(group) for group in client.param_groups] == groups
    train(made, 2, 3)
    outside.step()
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    assert made.get_lr() == [pytest.approx(5e-3)]


# - errors


def test_nothing_to_load_gives_none(tmp_path: Path, capsys: Any) -> None:
    for stage in (0, 1, 2):
        assert engine(stage, "fp32").load_checkpoint(tmp_path / "nowhere") == (None, None)
    assert "latest" in capsys.readouterr().out


def test_a_missing_tag_is_an_assertion_error(tmp_path: Path) -> None:
    made, _ = checkpoint(tmp_path, 0, "fp32")
    with pytest.raises(AssertionError, match="no model states"):
        made.load_checkpoint(tmp_path, tag="other")


@pytest.mark.parametrize("tag", ["../x", "/x", "a\\..\\..\\b", ""])
def test_tags_that_lead_elsewhere_are_refused_both_ways(tag: str, tmp_path: Path) -> None:
    made = engine(0, "fp32")
    folder = tmp_path / "checkpoints"
    with pytest.raises(ValueError, match="unusable checkpoint tag"):
        made.save_checkpoint(folder, tag=tag)
    with pytest.raises(ValueError, match="unusable checkpoint tag"):
        made.load_checkpoint(folder, tag=tag)
    folder.mkdir()
    (folder / "latest").write_text(tag or "..", encoding="utf-8")
    with pytest.raises(ValueError, match="unusable checkpoint tag"):
        made.load_checkpoint(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("nothing", ["", None])
def test_no_folder_is_a_value_error(nothing: Any) -> None:
    with pytest.raises(ValueError, match="needs a folder"):
        engine(0, "fp32").save_checkpoint(nothing)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    made, _ = checkpoint(tmp_path, 2, "bf16")
    (tmp_path / "global_step3" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(DeepSpeedCheckpointError, match="no optimizer shards|is missing"):
        made.load_checkpoint(tmp_path)
    made.load_checkpoint(tmp_path, load_optimizer_states=False)


def test_a_damaged_file_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, "fp32")
    path = tmp_path / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    made = engine(1, "fp32", seed=9)
    before = state_of_weights(made)["head.weight"].clone()
    with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
        made.load_checkpoint(tmp_path)
    assert torch.equal(state_of_weights(made)["head.weight"], before)


def test_an_optimizer_over_other_parameters_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, "fp32", frozen=True)
    with pytest.raises(DeepSpeedCheckpointError, match=r"fc\.weight"):
        engine(1, "fp32").load_checkpoint(tmp_path)


def test_shards_without_a_version_are_an_assertion_error(tmp_path: Path) -> None:
    made, _ = checkpoint(tmp_path, 1, "fp32")
    made.save_checkpoint(tmp_path, tag="old", client_state={"ds_version": "0.3.16"})
    with pytest.raises(AssertionError, match=r"0\.3\.16"):
        made.load_checkpoint(tmp_path, tag="old")


# - weights alone
