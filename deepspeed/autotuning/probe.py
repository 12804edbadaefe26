# SPDX-License-Identifier: Apache-2.0
"""The engine's side of the search: measure some steps, leave the numbers in a file, end the script."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..accelerator import get_accelerator
from ..utils.errors import DeepSpeedConfigError, explain
from .config import DeepSpeedAutotuningConfig

METRIC_FILE = "autotuning_metric.json"


class TuningProbe:
    """Measures the steps after ``start_profile_step``, up to ``end_profile_step``.

    Args:
        section: the configuration's ``autotuning``.

    Raises:
        DeepSpeedConfigError: there is no step between the two.
    """

    def __init__(self, section: DeepSpeedAutotuningConfig) -> None:
        self.first = (
            section.start_profile_step if section.start_step is None else section.start_step
        )
        self.last = section.end_profile_step if section.end_step is None else section.end_step
        self.path = Path(section.metric_path or METRIC_FILE)
        self._began: float | None = None
        if not 0 <= self.first < self.last:
            raise DeepSpeedConfigError(
                explain(
                    "autotuning measures no step",
                    got=f"start_profile_step {self.first}, end_profile_step {self.last}",
                    expected="0 <= start_profile_step < end_profile_step",
                )
            )

    def after_step(self, engine: Any) -> None:
        """Called after each optimizer step; after the last measured one it ends the process well.

        Raises:
            SystemExit: with status 0, after the last measured step.
        """
        if engine.global_steps < self.first:
            return
        get_accelerator().synchronize()
        now = time.perf_counter()
        if self._began is None:
            self._began, self._from = now, engine.global_steps
        elif engine.global_steps >= self.last:
            latency = (now - self._began) / (engine.global_steps - self._from)
            if engine.global_rank == 0:
                told = {
                    "throughput": engine.train_batch_size() / latency,
                    "latency": latency,
                    "train_batch_size": engine.train_batch_size(),
                    "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
                    "memory_bytes": int(get_accelerator().max_memory_allocated() or 0),
                }
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(told, indent=1), encoding="utf-8")
            raise SystemExit(0)
