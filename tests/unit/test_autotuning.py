# SPDX-License-Identifier: Apache-2.0
"""The search for a configuration: which runs it makes, what it takes from them, what the engine measures."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from deepspeed.autotuning import Autotuner, ResourceManager, scheduler
from deepspeed.autotuning.config import DeepSpeedAutotuningConfig
from deepspeed.autotuning.probe import TuningProbe
from deepspeed.autotuning.utils import get_val_by_key, set_val_by_key
from deepspeed.launcher.runner import parse_args
from deepspeed.utils.errors import DeepSpeedConfigError

SLOTS = {"localhost": [0, 1]}


def make(folder, config=None, *, words=("--deepspeed_config", "ds.json"), **section):
    path = folder / "ds.json"
    config = {"optimizer": {"type": "Adam"}, "autotuning": section, **(config or {})}
    path.write_text(json.dumps(config), encoding="utf-8")
    flags = ["--num_gpus", "2", "--autotuning", "tune", "-q"]
    tuner = Autotuner(parse_args([*flags, "train.py", *words]), SLOTS)
    return tuner


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs that cost nothing: each is looked up in a table of throughputs; what is missing fails."""
    monkeypatch.chdir(tmp_path)
    table, ran = {}, []

    def run(self, experiment, overwrite=True):
        ran.append(experiment.name)
        if experiment.name in table:
            speed = table[experiment.name]
            experiment.metrics = {"throughput": speed, "latency": 1 / speed}
        else:
            experiment.status = 1

    monkeypatch.setattr(ResourceManager, "run", run)
    return SimpleNamespace(table=table, ran=ran, folder=tmp_path)


def test_each_stage_grows_until_it_fails(measured):
    measured.table.update(z0_mbs1=1, z0_mbs2=2, z1_mbs1=1, z1_mbs2=3, z1_mbs4=5, z2_mbs1=2)
    tuner = make(measured.folder, tuner_early_stopping=50)
    assert tuner.tune().name == "z1_mbs4"
    assert measured.ran == [
        *("z0_mbs1", "z0_mbs2", "z0_mbs4"),
        *("z1_mbs1", "z1_mbs2", "z1_mbs4", "z1_mbs8"),
        *("z2_mbs1", "z2_mbs2"),
        "z3_mbs1",
    ]


@pytest.mark.parametrize(
    ("config", "section", "names"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            {"max_train_batch_size": 8},
            "z2_mbs1 z2_mbs2 z2_mbs4",
        ),
        ({"zero_optimization": {"stage": "auto"}}, {"tuner_num_trials": 2}, "z0_mbs1 z0_mbs2"),
        (
            {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2},
            {"max_train_batch_size": 8, "min_train_batch_size": 8},
            "z1_mbs2",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            {"min_train_micro_batch_size_per_gpu": 3, "max_train_micro_batch_size_per_gpu": 6},
            "z0_mbs3 z0_mbs6",
        ),
    ],
)
def test_bounds_are_kept(measured, config, section, names):
    measured.table.update({f"z{stage}_mbs{2**k}": 2**k for stage in range(4) for k in range(12)})
    measured.table.update(z0_mbs3=3, z0_mbs6=6)
    make(measured.folder, config, **section).tune()
    assert measured.ran == names.split()


def test_sizes_without_gain_end_a_stage_and_trials_without_gain_the_search(measured):
    measured.table.update({f"z{stage}_mbs{2**k}": 5 - k for stage in range(4) for k in range(4)})
    tuner = make(measured.folder, num_tuning_micro_batch_sizes=1, tuner_early_stopping=3)
    assert tuner.tune().name == "z0_mbs1"
    assert measured.ran == ["z0_mbs1", "z0_mbs2", "z1_mbs1", "z1_mbs2"]


def test_latency_is_better_when_smaller(measured):
    measured.table.update(z0_mbs1=4, z0_mbs2=8)
    tuner = make(measured.folder, {"zero_optimization": {"stage": 0}}, metric="latency")
    assert tuner.tune().name == "z0_mbs2"


def test_results_are_written_as_files_to_use(measured, capsys):
    measured.table.update(z1_mbs1=2.0, z1_mbs2=3.0)
    base = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}, "train_batch_size": 32}
    words = ["--x", "a b", "--deepspeed=ds.json", "--batch", "1"]
    tuner = make(
        measured.folder, base, words=words, arg_mappings={"train_micro_batch_size_per_gpu": "batch"}
    )
    tuner.tune()
    tuner.print_tuning_results()
    tuner.write_optimal_config()
    results = measured.folder / "autotuning_results"
    optimal = json.loads((results / "ds_config_optimal.json").read_text(encoding="utf-8"))
    assert optimal["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7}
    assert (optimal["train_micro_batch_size_per_gpu"], optimal.get("autotuning")) == (2, None)
    assert "train_batch_size" not in optimal
    line = (results / "cmd_optimal.txt").read_text(encoding="utf-8")
    packed = '"a b"' if os.name == "nt" else "'a b'"
    assert line.endswith(
        f"-m deepspeed --num_gpus 2 -q train.py --x {packed} "
        f"--deepspeed={results / 'ds_config_optimal.json'} --batch 2\n"
    )
    summary = (results / "summary.txt").read_text(encoding="utf-8")
    assert summary in capsys.readouterr().out
    assert "z1_mbs4         failed with 1" in summary
    assert "best throughput: z1_mbs2" in summary


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--deepspeed_config", "a"], (1, "", "a")),
        (["x", "--deepspeed", "--deepspeed_config=a"], (2, "--deepspeed_config=", "a")),
        (["--deepspeed", "a", "y"], (1, "", "a")),
    ],
)
def test_the_configuration_is_found_among_the_arguments(words, found):
    assert scheduler.find_config_word(words) == found


@pytest.mark.parametrize("words", [[], ["--deepspeed"], ["--deepspeed", "--x"]])
def test_a_script_without_a_configuration_is_refused(words):
    with pytest.raises(DeepSpeedConfigError, match="--deepspeed_config FILE"):
        scheduler.find_config_word(words)


@pytest.mark.parametrize(
    "section", [{"metric": "flops"}, {"tuner_type": "model_based"}, {"fast": False}]
)
def test_what_is_not_there_is_refused_by_name(tmp_path, monkeypatch, section):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotImplementedError, match=f"autotuning.{next(iter(section))}"):
        make(tmp_path, **section)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--autotuning", "run", "--num_gpus", "2"], ["--num_gpus", "2"]),
        (["-q", "--autotuning=tune", "--module"], ["-q", "--module"]),
        (["--num_gpus", "1"], ["--num_gpus", "1"]),
    ],
)
def test_experiments_do_not_search_themselves(flags, kept):
    assert scheduler._without_autotuning(flags) == kept


def test_flags_follow_keys_wherever_they_stand(tmp_path):
    config = {"optimizer": {"type": "Adam", "params": {"lr": 1}}, "bf16": {"enabled": True}}
    flags = {" lr ": "-l", "optimizer.type": "optim", "bf16.enabled": "--half", "absent": "--x"}
    runs = ResourceManager(None, ["a", "b"], 4, tmp_path, tmp_path, flags)
    assert runs.changed_flags(config) == {"-l": "1", "--optim": "Adam", "--half": "True"}
    set_val_by_key(config, "lr", 2)
    assert get_val_by_key(config, "lr") == 2
    assert get_val_by_key(config, "absent") is None


def engine_of(steps):
    return SimpleNamespace(
        global_steps=steps,
        global_rank=0,
        train_batch_size=lambda: 32,
        train_micro_batch_size_per_gpu=lambda: 4,
    )


def test_the_engine_measures_steps_and_ends_the_script(tmp_path, monkeypatch):
    clock = iter([10.0, 11.0, 14.0])
    monkeypatch.setattr("deepspeed.autotuning.probe.time.perf_counter", lambda: next(clock))
    path = tmp_path / "deep" / "metric.json"
    section = DeepSpeedAutotuningConfig(
        start_profile_step=2, end_profile_step=4, metric_path=str(path)
    )
    probe = TuningProbe(section)
    for step in (1, 2, 3):
        probe.after_step(engine_of(step))
    assert not path.exists()
    with pytest.raises(SystemExit) as ended:
        probe.after_step(engine_of(4))
    assert ended.value.code == 0
    told = json.loads(path.read_text(encoding="utf-8"))
    assert (told["latency"], told["throughput"]) == (2.0, 16.0)  # two steps in four seconds


def test_no_step_to_measure_is_refused():
    with pytest.raises(DeepSpeedConfigError, match="measures no step"):
        TuningProbe(DeepSpeedAutotuningConfig(start_profile_step=5, end_profile_step=5))
