# SPDX-License-Identifier: Apache-2.0
"""Runs the search's experiments: the user's script with another configuration, one after the other."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.command_line import as_typed
from ..utils.errors import DeepSpeedConfigError, explain
from .probe import METRIC_FILE
from .utils import get_val_by_key

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
        hosts: names of the hosts.
        num_gpus_per_node: devices of each.
        results_dir: gets a folder for each experiment, with its configuration, output and metrics.
        exps_dir: gets each experiment's description.
        arg_mappings: key of the configuration, dotted or bare -> flag of the script that has to follow it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        hosts: Sequence[str],
        num_gpus_per_node: int,
        results_dir: Path,
        exps_dir: Path,
        arg_mappings: Mapping[str, str] | None,
    ) -> None:
        self.args = args
        self.hosts, self.num_gpus_per_node = hosts, num_gpus_per_node
        self.results_dir, self.exps_dir = results_dir, exps_dir
        self.arg_mappings = {
            key.strip(): flag.strip() for key, flag in (arg_mappings or {}).items()
        }

    def changed_flags(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return the script's own flags that have to follow a configuration, with their values."""
        changed = {}
        for key, flag in self.arg_mappings.items():
            value: Any = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            value = get_val_by_key(config, key) if value is None else value
            if value is not None:
                changed[flag if flag.startswith("-") else f"--{flag}"] = str(value)
        return changed

    def command(self, config_path: Path, config: Mapping[str, Any]) -> list[str]:
        """Return the command that runs the script with another configuration.

        Args:
            config_path: where it is written.
            config: the configuration.
        """
        words = list(self.args.user_args)
        at, before, _ = find_config_word(words)
        words[at] = f"{before}{config_path.resolve()}"
        for flag, value in self.changed_flags(config).items():
            words = _with_flag(words, flag, value)
        flags = _without_autotuning(self.args.launcher_words)
        return [sys.executable, "-m", "deepspeed", *flags, self.args.user_script, *words]

    def run(self, experiment: Experiment, overwrite: bool = True) -> None:
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
            command = self.command(path, config)
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
