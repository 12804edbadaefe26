# SPDX-License-Identifier: Apache-2.0
"""`ds_report --plan`: configurations and models, read without allocating anything."""

from __future__ import annotations

import json

import pytest
import torch

from deepspeed import env_report
from deepspeed.runtime import memory_plan
from deepspeed.runtime.zero.estimate import ModelSize

CONFIG = {
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "stage3_prefetch_bucket_size": "auto",
        "offload_optimizer": {"device": "nvme", "nvme_path": "nowhere"},
        "offload_param": {"device": "cpu"},
    },
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


def bytes_by_place(config, model, world=1, **options):
    plan = memory_plan.plan_for(memory_plan.read_config(config), model, world, **options)
    return {(row.role, row.tier): row.nbytes for row in plan.rows}


def test_configuration_with_auto_values_is_planned():
    size = ModelSize((4000, 4000), largest_layer=4000)
    found = bytes_by_place(CONFIG, size, world=4)
    assert found["params", "host"] == 2000 * 2
    assert found["master weights", "file"] == 2000 * 4
    assert found["optimizer states", "file"] == 2000 * 8
    assert found["gathered params", "device"] == 8000 * 2


@pytest.mark.parametrize(
    ("zero", "whole"),
    [
        ({}, 6000),  # kept for the backward pass: 1e9 / 2 elements would be
        ({"max_reuse_distance": 0, "prefetch_bucket_size": 0}, 1000),
        ({"max_reuse_distance": 0, "prefetch_bucket_size": 500}, 1500),
        ({"max_reuse_distance": 5000, "prefetch_bucket_size": 0}, 2500),
        ({"max_reuse_distance": 5000, "max_live_parameters": 2000}, 2000),
        (
            {
                "max_reuse_distance": 0,
                "prefetch_bucket_size": 0,
                "param_persistence_threshold": 1000,
            },
            6000,
        ),
    ],
)
def test_whole_params_follow_the_residency_rules(zero, whole):
    section = {f"stage3_{k}": v for k, v in {"param_persistence_threshold": 0, **zero}.items()}
    config = {"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3, **section}}
    found = bytes_by_place(config, ModelSize((1000,) * 6, largest_layer=1000), world=2)
    assert found["gathered params", "device"] == whole * 4


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        ({"type": "Adam"}, 8),
        ({"type": "Lion"}, 4),
        ({"type": "SGD"}, 0),
        ({"type": "SGD", "params": {"momentum": 0.9}}, 4),
    ],
)
def test_optimizers_differ_in_states(optimizer, states):
    config = {"optimizer": optimizer, "zero_optimization": {"stage": 1}}
    found = bytes_by_place(config, ModelSize((100,), largest_layer=100))
    assert found.get(("optimizer states", "device"), 0) == 100 * states
    assert ("master weights", "device") not in found  # fp32 params are the masters


def test_cpu_only_run_has_one_kind_of_memory():
    config = {"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}
    found = bytes_by_place(config, ModelSize((100,), largest_layer=100), device_is_host=True)
    assert {tier for _, tier in found} == {"host"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7B", 7e9),
        ("350m", 3.5e8),
        ("1.3e9", 1.3e9),
        ("1_000_000", 1e6),
        ("2,5", 25),
        ("12k", 12e3),
    ],
)
def test_sizes_in_words(text, number):
    assert memory_plan.parse_number(text) == number


@pytest.mark.parametrize("text", ["", "7X", "B", "-1", "0", "nan", "inf", "1e999"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="no model size"):
        memory_plan.parse_number(text)


@pytest.mark.parametrize("numel", [1, 1000, 350_000_000, 7_000_000_000])
def test_assumed_transformer_has_the_size_asked_for(numel):
    size = memory_plan.typical_transformer(numel)
    assert size.numel == numel and 0 < size.largest_layer <= numel


def test_assumed_transformer_of_7b_is_like_published_ones():
    size = memory_plan.typical_transformer(7_000_000_000)
    # Llama 2 7B: 32 layers of width 4096.
    assert 90 <= len(size.trainable) <= 105
    assert 4000**2 * 4 < sorted(size.trainable)[len(size.trainable) // 2] < 4400**2 * 5


NET = {"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(3), "b.weight": torch.zeros(2, 3)}
NET_SIZE = ModelSize((12, 3, 6), largest_layer=15)


def test_model_files_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(NET, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.save(NET, tmp_path / "model.bin")
    torch.save({"module": NET, "step": 3}, tmp_path / "model.pt")
    index = {"weight_map": dict.fromkeys(NET, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in ("model.safetensors", "model.safetensors.index.json", "model.bin", "model.pt", "."):
        size = memory_plan.read_model_size(tmp_path / name)
        assert sorted(size.trainable) == sorted(NET_SIZE.trainable), name
        assert size.largest_layer == NET_SIZE.largest_layer, name


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("none.safetensors", None, FileNotFoundError),
        ("cut.safetensors", b"\xff" * 8, ValueError),
        ("model.gguf", b"", ValueError),
        ("empty", "folder", ValueError),
    ],
)
def test_bad_model_files_are_refused(tmp_path, name, content, error):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(error):
        memory_plan.read_model_size(path)


def test_report_prints_the_plan_and_nothing_else(config_file, capsys):
    env_report.cli_main(["--plan", str(config_file), "--model-size", "7B", "--ranks", "4"])
    out = capsys.readouterr().out
    assert "ZeRO stage 3, 4 ranks, 7000.0 M params" in out
    assert "master weights" in out and "6.52 GB" in out
    assert "typical transformer" in out and "op report" not in out


def test_report_of_a_model_file(config_file, tmp_path, capsys):
    torch.save(NET, tmp_path / "model.bin")
    env_report.cli_main(["--plan", str(config_file), "--model", str(tmp_path / "model.bin")])
    assert "typical transformer" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--plan", "x.json"], 2, "--model-size"),
        (["--plan", "x.json", "--model-size", "1", "--model", "y"], 2, "--model-size"),
        (["--plan", "no such.json", "--model-size", "1"], 1, "no configuration found"),
    ],
)
def test_mistakes_end_with_one_line(words, code, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        env_report.cli_main(words)
    assert stopped.value.code == code
    assert said in capsys.readouterr().err


def test_narrow_states_are_counted_narrow():
    config = memory_plan.read_config(
        {"optimizer": {"type": "Adam", "params": {"fp32_optimizer_states": False}}}
    )
    assert memory_plan.widths_of(config).state == 2
