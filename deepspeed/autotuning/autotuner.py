# SPDX-License-Identifier: Apache-2.0
"""The launcher's side of the search: short runs of the user's script at each ZeRO stage and micro-batch size."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.config import load_config
from ..runtime.config_utils import is_auto
from ..utils.command_line import as_typed
from ..utils.errors import DeepSpeedConfigError, explain
from ..utils.logging import logger
from .config import get_autotuning_config
from .probe import METRIC_FILE

MICRO = "train_micro_batch_size_per_gpu"
STAGES = (0, 1, 2, 3)
METRICS = ("throughput", "latency")
_CONFIG_FLAGS = ("--deepspeed_config", "--deepspeed")


@dataclass
class Experiment:
    """One run to measure.

    Attributes:
        name: such as ``z2_mbs8``.
        config: its whole configuration.
        metrics: what it measured; None when it failed.
        status: exit status of the launcher.
    """

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any] | None = None
    status: int = 0
    folder: Path = field(default_factory=Path)


def find_config_word(words: Sequence[str]) -> tuple[int, str, str]:
    """Return where the script's arguments name the configuration: index, text before the path, path.

    Raises:
        DeepSpeedConfigError: they do not.
    """
    for at, word in enumerate(words):
        for flag in _CONFIG_FLAGS:
            if word.startswith(flag + "="):
                return at, flag + "=", word[len(flag) + 1 :]
            following = words[at + 1] if at + 1 < len(words) else "-"
            if word == flag and not following.startswith("-"):
                return at + 1, "", following
    raise DeepSpeedConfigError(
        explain(
            "autotuning needs the configuration as a file among the script's arguments",
            got=" ".join(words) or "no argument",
            expected="--deepspeed_config FILE or --deepspeed FILE",
        )
    )


class ResourceManager:
    """Runs experiments one after the other on all of the job's devices.

    Args:
        args: the ``deepspeed`` command line.
        active_resources: slots of each host.
        results_dir: gets a folder for each experiment, with its configuration, output and metrics.
        exps_dir: gets each experiment's description.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        active_resources: Mapping[str, Sequence[int]],
        results_dir: Path,
        exps_dir: Path,
    ) -> None:
        self.args = args
        self.devices = sum(len(slots) for slots in active_resources.values())
        self.results_dir, self.exps_dir = results_dir, exps_dir

    def command(self, config_path: Path, changed: Mapping[str, str]) -> list[str]:
        """Return the command that runs the script with another configuration.

        Args:
            config_path: the configuration.
            changed: flags of the script and the values to give them.
        """
        words = list(self.args.user_args)
        at, before, _ = find_config_word(words)
        words[at] = f"{before}{config_path.resolve()}"
        for flag, value in changed.items():
            words = _with_flag(words, flag, value)
        flags = _without_autotuning(self.args.launcher_words)
        return [sys.executable, "-m", "deepspeed", *flags, self.args.user_script, *words]

    def run(
        self, experiment: Experiment, changed: Mapping[str, str], overwrite: bool = True
    ) -> None:
        """Run one experiment and fill in what came of it; with ``overwrite`` off a former result counts."""
        folder = experiment.folder = self.results_dir / experiment.name
        metrics = folder / METRIC_FILE
        if overwrite or not metrics.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.exps_dir.mkdir(parents=True, exist_ok=True)
            config = copy.deepcopy(experiment.config)
            config["autotuning"] = {
                **config.get("autotuning", {}),
                "enabled": True,
                "metric_path": str(metrics.resolve()),
            }
            described = json.dumps({"name": experiment.name, "ds_config": config}, indent=1)
            (self.exps_dir / f"{experiment.name}.json").write_text(described, encoding="utf-8")
            path = folder / "ds_config.json"
            path.write_text(json.dumps(config, indent=1), encoding="utf-8")
            command = self.command(path, changed)
            (folder / "cmd.txt").write_text(as_typed(command) + "\n", encoding="utf-8")
            with (
                (folder / "stdout.log").open("wb") as out,
                (folder / "stderr.log").open("wb") as err,
            ):
                experiment.status = subprocess.run(command, stdout=out, stderr=err).returncode
        if experiment.status == 0 and metrics.is_file():
            experiment.metrics = json.loads(metrics.read_text(encoding="utf-8"))


def _without_autotuning(flags: Sequence[str]) -> list[str]:
    kept, skip = list[str](), False
    for word in flags:
        if skip or word.startswith("--autot"):
            skip = not skip and "=" not in word
            continue
        kept.append(word)
    return kept


def _with_flag(words: Sequence[str], flag: str, value: str) -> list[str]:
    """Give the script's ``flag`` another value, wherever it stands; at the end where it stands nowhere."""
    changed = list(words)
    for at, word in enumerate(changed):
        if word.startswith(flag + "="):
            changed[at] = f"{flag}={value}"
            return changed
        if word == flag and at + 1 < len(changed):
            changed[at + 1] = value
            return changed
    return [*changed, flag, value]


class Autotuner:
    """Searches for the ZeRO stage and micro-batch size with the best metric.

    At each stage that the configuration leaves open the micro-batch size is doubled, until a run fails
    (out of memory), a bound is reached, or as many sizes as ``num_tuning_micro_batch_sizes`` bring no gain.

    Args:
        args: the ``deepspeed`` command line.
        active_resources: slots of each host.

    Raises:
        DeepSpeedConfigError: the script names no configuration, or it is not usable.
        NotImplementedError: the section asks for what is not there.
    """

    def __init__(
        self, args: argparse.Namespace, active_resources: Mapping[str, Sequence[int]]
    ) -> None:
        self.args = args
        self.user_config = load_config(find_config_word(args.user_args)[2])
        self.section = get_autotuning_config(self.user_config)
        self._refuse_the_unbuilt()
        self.results_dir = Path(self.section.results_dir)
        self.rm = ResourceManager(
            args, active_resources, self.results_dir, Path(self.section.exps_dir)
        )
        self.ranks = max(1, self.rm.devices // max(1, self.section.mp_size))
        self.records: list[Experiment] = []
        self.optimal: Experiment | None = None

    def _refuse_the_unbuilt(self) -> None:
        section = self.section
        for key, value, built in (
            ("metric", section.metric, METRICS),
            ("tuner_type", section.tuner_type, ("gridsearch",)),
            ("fast", section.fast, (True,)),
        ):
            if value not in built:
                raise NotImplementedError(
                    explain(
                        f"'autotuning.{key}' asks for what is not available in this version",
                        got=repr(value),
                        expected=" or ".join(map(repr, built)),
                    )
                )

    def _stages(self) -> tuple[int, ...]:
        stage = self.user_config.get("zero_optimization", {}).get("stage", "auto")
        return STAGES if is_auto(stage) else (int(stage),)

    def _accumulation(self) -> int:
        given = self.user_config.get("gradient_accumulation_steps", 1)
        return 1 if is_auto(given) else int(given)

    def _experiment(self, stage: int, micro: int) -> Experiment:
        config = copy.deepcopy(self.user_config)
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": stage}
        config[MICRO] = micro
        config["gradient_accumulation_steps"] = self._accumulation()
        config.pop("train_batch_size", None)
        return Experiment(f"z{stage}_mbs{micro}", config)

    def _sizes(self) -> Iterator[int]:
        section, micro = self.section, self.section.min_train_micro_batch_size_per_gpu
        while micro <= section.max_train_micro_batch_size_per_gpu:
            batch = micro * self._accumulation() * self.ranks
            if section.max_train_batch_size is not None and batch > section.max_train_batch_size:
                return
            if batch >= section.min_train_batch_size:
                yield micro
            micro *= 2

    def _changed_flags(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return the script's own flags that have to follow the configuration."""
        changed = {}
        for key, flag in (self.section.arg_mappings or {}).items():
            value: Any = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                changed[flag if flag.startswith("-") else f"--{flag}"] = str(value)
        return changed

    def _better(self, one: Experiment, other: Experiment | None) -> bool:
        if one.metrics is None or other is None or other.metrics is None:
            return one.metrics is not None
        ours, theirs = (e.metrics[self.section.metric] for e in (one, other))  # type: ignore[index]
        return ours < theirs if self.section.metric == "latency" else ours > theirs

    def tune(self) -> Experiment | None:
        """Run the search; return the best experiment, None when none succeeded."""
        without_gain = 0
        for stage in self._stages():
            best, idle = None, 0
            for micro in self._sizes():
                if (
                    len(self.records) >= self.section.tuner_num_trials
                    or idle >= self.section.num_tuning_micro_batch_sizes
                    or without_gain >= self.section.tuner_early_stopping
                ):
                    break
                experiment = self._experiment(stage, micro)
                logger.info("autotuning: running %s", experiment.name)
                changed = self._changed_flags(experiment.config)
                self.rm.run(experiment, changed, self.section.overwrite)
                self.records.append(experiment)
                if experiment.metrics is None:
                    logger.info("autotuning: %s failed, see %s", experiment.name, experiment.folder)
                    break
                idle = 0 if self._better(experiment, best) else idle + 1
                best = experiment if self._better(experiment, best) else best
                gained = self._better(experiment, self.optimal)
                without_gain = 0 if gained else without_gain + 1
                self.optimal = experiment if gained else self.optimal
        return self.optimal

    def _table(self) -> str:
        lines = [f"{'experiment':<16}{'samples/s':>14}{'s per step':>14}"]
        for experiment in self.records:
            told = experiment.metrics
            numbers = (
                f"failed with {experiment.status}" if experiment.status else "measured nothing"
            )
            if told is not None:
                numbers = f"{told['throughput']:>14.3f}{told['latency']:>14.6f}"
            lines.append(f"{experiment.name:<16}{numbers}")
        if self.optimal is not None:
            lines.append(f"best {self.section.metric}: {self.optimal.name}")
        return "\n".join(lines)

    def print_tuning_results(self) -> None:
        """Print what was measured."""
        print(self._table(), flush=True)

    def write_optimal_config(self) -> None:
        """Write ``summary.txt``, and of a successful search the configuration and the command to use."""
        self.results_dir.mkdir(parents=True, exist_ok=True)
        (self.results_dir / "summary.txt").write_text(self._table() + "\n", encoding="utf-8")
        if self.optimal is None:
            return
        config = {k: v for k, v in self.optimal.config.items() if k != "autotuning"}
        path = self.results_dir / "ds_config_optimal.json"
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
        command = as_typed(self._optimal_command()) + "\n"
        (self.results_dir / "cmd_optimal.txt").write_text(command, encoding="utf-8")

    def _optimal_command(self) -> list[str]:
        assert self.optimal is not None
        path = self.results_dir / "ds_config_optimal.json"
        return self.rm.command(path, self._changed_flags(self.optimal.config))

    def run_after_tuning(self) -> int:
        """Run the script with the best configuration; return its status, 1 when there is none."""
        if self.optimal is None:
            return 1
        return subprocess.run(self._optimal_command()).returncode
