# SPDX-License-Identifier: Apache-2.0
"""Elastic batch sizes against a brute-force count of their defining property, and every refusal."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.elasticity import (
    ElasticityConfig,
    ElasticityConfigError,
    ElasticityError,
    ElasticityIncompatibleWorldSize,
    compute_elastic_config,
    elasticity_enabled,
    ensure_immutable_elastic_config,
)
from deepspeed.elasticity.cli import main
from deepspeed.elasticity.elasticity import compatible_by_device, valid_device_counts
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.utils import env

SECTION = {
    "enabled": True,
    "max_train_batch_size": 10000,
    "micro_batch_sizes": [8, 12, 16, 17],
    "min_gpus": 32,
    "max_gpus": 1500,
    "version": 0.1,
}


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    monkeypatch.delenv("DEEPSPEED_ELASTICITY_CONFIG", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def ask(world_size=0, return_microbatch=False, **changes):
    section = {**SECTION, **changes}
    section = {key: value for key, value in section.items() if value is not None}
    return compute_elastic_config({"elasticity": section}, "0.20.0", world_size, return_microbatch)


def fits(batch, devices, micro_batches):
    """The property itself: each device gets the same whole number of micro batches of some size."""
    return any(batch % (devices * micro) == 0 for micro in micro_batches)


def test_published_example():
    batch, counts = ask()
    assert batch == 9792 and len(counts) == 23
    assert ask(world_size=64)[2] == 17


@pytest.mark.parametrize("larger", [True, False])
def test_valid_counts_are_exactly_those_that_fit(larger):
    batch, counts = ask(prefer_larger_batch=larger)
    assert counts == [n for n in range(32, 1501) if fits(batch, n, SECTION["micro_batch_sizes"])]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True),
    st.integers(40, 4000),
    st.integers(1, 16),
    st.integers(16, 300),
    st.booleans(),
)
def test_batch_stays_within_its_limit_and_counts_are_exact(micros, limit, low, high, larger):
    batch, counts = compatible_by_device(micros, limit, low, high, larger)
    assert 0 < batch <= limit
    assert counts == [n for n in range(low, high + 1) if fits(batch, n, micros)]
    assert any(batch % micro == 0 for micro in micros)


def test_valid_device_counts_of_a_small_case():
    assert valid_device_counts(12, [2, 3], 1, 12) == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("devices", [32, 64, 1224])
def test_micro_batch_is_the_largest_that_fits(devices):
    batch, counts, micro = ask(world_size=devices)
    assert devices in counts and batch % (devices * micro) == 0
    larger = [size for size in SECTION["micro_batch_sizes"] if size > micro]
    assert not any(batch // devices % size == 0 for size in larger)


@pytest.mark.parametrize("devices", [1, 33, 1500])
def test_other_numbers_of_devices_are_refused(devices):
    with pytest.raises(ElasticityIncompatibleWorldSize, match=str(devices)):
        ask(world_size=devices)


def test_microbatch_can_be_asked_for_without_devices():
    assert len(ask(return_microbatch=True)) == 3 and len(ask()) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_train_batch_size": None}, "max_train_batch_size"),
        ({"micro_batch_sizes": None}, "micro_batch_sizes"),
        ({"micro_batch_sizes": 8}, "micro_batch_sizes"),
        ({"micro_batch_sizes": []}, "micro_batch_sizes"),
        ({"micro_batch_sizes": [8, 0]}, "micro_batch_sizes"),
        ({"micro_batch_sizes": [8, -1]}, "micro_batch_sizes"),
        ({"micro_batch_sizes": [8, "16"]}, "micro_batch_sizes"),
        ({"micro_batch_sizes": [8, 20000]}, "largest batch size"),
        ({"min_gpus": 0}, "min_gpus"),
        ({"max_gpus": -1}, "max_gpus"),
        ({"max_gpus": 8}, "max_gpus"),
        ({"min_time": -1}, "min_time"),
        ({"model_parallel_size": 0}, "model_parallel_size"),
        ({"model_parallel_size": 2}, "version"),
        ({"version": 0.3}, "version"),
        ({"enabled": False}, "disabled"),
    ],
)
def test_unusable_sections_are_config_errors(changes, said):
    with pytest.raises(ElasticityConfigError, match=said) as caught:
        ask(**changes)
    assert isinstance(caught.value, (ElasticityError, DeepSpeedConfigError))


def test_missing_section_is_a_config_error():
    with pytest.raises(ElasticityConfigError, match="elasticity"):
        compute_elastic_config({"train_batch_size": 4})


@pytest.mark.parametrize("version", [0.05, 0.15])
def test_versions_that_never_were(version):
    with pytest.raises(NotImplementedError, match=str(version)):
        ask(version=version)


def test_defaults_of_the_section():
    section = ElasticityConfig({})
    assert (section.enabled, section.version, section.prefer_larger_batch) == (False, 0.2, True)
    assert (section.max_acceptable_batch_size, section.micro_batches) == (2000, [2, 4, 6])
    assert (section.min_gpus, section.max_gpus, section.min_time) == (1, 10000, 0)
    assert (section.model_parallel_size, section.num_gpus_per_node) == (1, 1)


@pytest.mark.parametrize("model_parallel", [1, 2, 4])
def test_by_node_counts_are_whole_nodes(model_parallel):
    batch, dp_sizes, micro = ask(
        64, version=0.2, model_parallel_size=model_parallel, num_gpus_per_node=8
    )
    assert all(size % (8 // model_parallel) == 0 for size in dp_sizes)
    assert batch <= SECTION["max_train_batch_size"]
    assert batch % (64 // model_parallel * micro) == 0
    assert all(fits(batch, size, SECTION["micro_batch_sizes"]) for size in dp_sizes)


def test_by_node_with_other_devices_takes_the_largest_batch_for_them():
    batch, dp_sizes, micro = ask(88, version=0.2, num_gpus_per_node=8)
    assert dp_sizes == [88]
    assert batch % (88 * micro) == 0
    assert batch == max(88 * size * (10000 // (88 * size)) for size in SECTION["micro_batch_sizes"])


def test_by_node_needs_the_number_of_devices(monkeypatch):
    with pytest.raises(ElasticityConfigError, match="WORLD_SIZE"):
        ask(version=0.2)
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert ask(version=0.2, num_gpus_per_node=8)[0] == ask(64, version=0.2, num_gpus_per_node=8)[0]


def test_model_parallel_groups_fit_into_nodes():
    with pytest.raises(ElasticityError, match="divide"):
        ask(64, version=0.2, model_parallel_size=3, num_gpus_per_node=8)


def test_too_many_devices_for_the_smallest_batch():
    with pytest.raises(ElasticityIncompatibleWorldSize):
        ask(4000, version=0.2, num_gpus_per_node=1, max_gpus=8, min_gpus=1)


SMALL = {"enabled": True, "max_train_batch_size": 100, "micro_batch_sizes": [2, 4], "version": 0.1}


def test_config_takes_its_batch_sizes_from_the_section(logged):
    config = DeepSpeedConfig({"elasticity": SMALL})
    batch, counts, micro = compute_elastic_config({"elasticity": SMALL}, world_size=1)
    assert config.elasticity_enabled is True and 1 in counts
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (batch, micro)
    assert config.gradient_accumulation_steps == batch // micro
    assert [text for text in logged if "DEEPSPEED_ELASTICITY_CONFIG" in text]


@pytest.mark.parametrize(
    "key", ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"]
)
def test_batch_sizes_beside_elasticity_are_refused_unless_ignored(key):
    with pytest.raises(ElasticityConfigError, match=key):
        DeepSpeedConfig({"elasticity": SMALL, key: 3})
    ignoring = {**SMALL, "ignore_non_elastic_batch_info": True}
    config = DeepSpeedConfig({"elasticity": ignoring, key: 3})
    assert config.train_batch_size == DeepSpeedConfig({"elasticity": SMALL}).train_batch_size


def test_disabled_section_changes_nothing():
    config = DeepSpeedConfig({"train_batch_size": 3, "elasticity": {"enabled": False}})
    assert config.train_batch_size == 3 and config.elasticity_enabled is False
    assert not elasticity_enabled({}) and elasticity_enabled({"elasticity": SMALL})


@pytest.mark.parametrize(
    ("changes", "agrees"),
    [
        ({}, True),
        ({"min_time": 5}, True),
        ({"max_train_batch_size": 200}, False),
        ({"micro_batch_sizes": [2]}, False),
        ({"version": 0.2}, False),
    ],
)
def test_scheduler_and_job_have_to_agree(changes, agrees):
    env.DEEPSPEED_ELASTICITY_CONFIG.set(json.dumps({**SMALL, **changes}))
    try:
        if agrees:
            ensure_immutable_elastic_config(SMALL)
        else:
            with pytest.raises(ElasticityConfigError, match=next(iter(changes))):
                ensure_immutable_elastic_config(SMALL)
    finally:
        env.DEEPSPEED_ELASTICITY_CONFIG.unset()


def test_command_prints_the_result(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"elasticity": SECTION}), encoding="utf-8")
    assert main(["--config", str(path), "-w", "64"]) == 0
    printed = capsys.readouterr().out
    assert "9792" in printed and "micro_batch_size .... 17" in printed
    assert main(["-c", str(path)]) == 0
    assert "micro_batch_size" not in capsys.readouterr().out.split("valid_gpus")[1]


@pytest.mark.parametrize("text", ["{}", '{"elasticity": {"enabled": true}}', "{"])
def test_command_fails_with_one_line_of_error(tmp_path, capsys, text):
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    assert main(["-c", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("ds_elastic: ")
    assert main(["-c", str(tmp_path / "missing.json")]) == 1


@pytest.mark.parametrize("version", ["0.2", "0.3.7"])
def test_releases_before_elastic_training_are_refused(version):
    with pytest.raises(ElasticityError, match="no elastic training"):
        compute_elastic_config({"elasticity": SECTION}, version)
    assert compute_elastic_config({"elasticity": SECTION}, "0.3.8+abc")[0] == 9792
