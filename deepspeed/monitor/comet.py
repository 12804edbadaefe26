# SPDX-License-Identifier: Apache-2.0
"""Comet experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Event, Monitor, is_first_rank, plain, require


class EventsLogScheduler:
    """Thins events out: of each name one in `samples_log_interval` samples."""

    def __init__(self, samples_log_interval: int) -> None:
        self.samples_log_interval = samples_log_interval
        self._last: dict[str, int] = {}

    def needs_logging(self, name: str, current_sample: int) -> bool:
        """Whether to record `name` now; if so, counts from here."""
        last = self._last.get(name)
        if last is not None and current_sample - last < self.samples_log_interval:
            return False
        self._last[name] = current_sample
        return True


class CometMonitor(Monitor):
    """Records events as metrics of a Comet experiment.

    Args:
        comet_config: section `comet`.

    Raises:
        ModuleNotFoundError: the package `comet_ml` is missing.
    """

    def __init__(self, comet_config: Any) -> None:
        super().__init__(comet_config)
        self.enabled = comet_config.enabled
        self.samples_log_interval = comet_config.samples_log_interval
        self._experiment: Any = None
        self._scheduler = EventsLogScheduler(comet_config.samples_log_interval)
        if self.enabled and is_first_rank():
            comet_ml = require("comet_ml", "comet_ml", "comet")
            self._experiment = comet_ml.start(
                api_key=comet_config.api_key,
                project=comet_config.project,
                workspace=comet_config.workspace,
                experiment_key=comet_config.experiment_key,
                mode=comet_config.mode,
                online=comet_config.online,
            )
            if comet_config.experiment_name is not None:
                self._experiment.set_name(comet_config.experiment_name)

    @property
    def experiment(self) -> Any:
        """The Comet experiment; None where nothing is recorded."""
        return self._experiment

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Record each `(name, value, step)` that is due."""
        if self._experiment is None or not is_first_rank():
            return
        for name, value, step in event_list:
            if self._scheduler.needs_logging(name, step):
                self._experiment.log_metric(name, plain(value), step=step)
