# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Event, Monitor, is_first_rank, plain, require


class WandbMonitor(Monitor):
    """Records events as a run of Weights & Biases.

    Args:
        wandb_config: section `wandb`.

    Raises:
        ModuleNotFoundError: the package `wandb` is missing.
    """

    def __init__(self, wandb_config: Any) -> None:
        super().__init__(wandb_config)
        self.enabled = wandb_config.enabled
        self.group = wandb_config.group
        self.team = wandb_config.team
        self.project = wandb_config.project
        self._wandb: Any = None
        if self.enabled and is_first_rank():
            self._wandb = require("wandb", "wandb", "wandb")
            self._wandb.init(project=self.project, group=self.group, entity=self.team)

    def log(
        self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
    ) -> None:
        """Pass `data` to `wandb.log`."""
        if self._wandb is not None and is_first_rank():
            self._wandb.log(data, step=step, commit=commit)

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Record each `(name, value, step)`."""
        for name, value, step in event_list:
            self.log({name: plain(value)}, step=step)
