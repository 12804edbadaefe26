# SPDX-License-Identifier: Apache-2.0
"""The launcher's side of the search: short runs of the user's script at each ZeRO stage and micro-batch size."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..runtime.config import load_config
from ..runtime.config_utils import is_auto
from ..utils.command_line import as_typed
from ..utils.errors import explain
from ..utils.logging import logger
from .config import get_autotuning_config
from .scheduler import Experiment, ResourceManager, find_config_word

MICRO = "train_micro_batch_size_per_gpu"
STAGES = (0, 1, 2, 3)
METRICS = ("throughput", "latency")


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
        slots = [len(ids) for ids in active_resources.values()]
        self.exp_num_nodes, self.exp_num_gpus = len(slots), min(slots, default=0)
        self.rm = ResourceManager(
            args,
            list(active_resources),
            self.exp_num_gpus,
            self.results_dir,
            Path(self.section.exps_dir),
            self.section.arg_mappings,
        )
        self.ranks = max(1, sum(slots) // max(1, self.section.mp_size))
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
                self.rm.run(experiment, self.section.overwrite)
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
        return self.rm.command(path, self.optimal.config)

    def run_after_tuning(self) -> int:
        """Run the script with the best configuration; return its status, 1 when there is none."""
        if self.optimal is None:
            return 1
        return subprocess.run(self._optimal_command()).returncode
