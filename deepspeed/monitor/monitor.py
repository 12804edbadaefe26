# SPDX-License-Identifier: Apache-2.0
"""One door to all recorders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Event, Monitor, is_first_rank
from .comet import CometMonitor
from .csv_monitor import csvMonitor
from .tensorboard import TensorBoardMonitor
from .wandb import WandbMonitor

__all__ = [
    "CometMonitor",
    "Monitor",
    "MonitorMaster",
    "TensorBoardMonitor",
    "WandbMonitor",
    "csvMonitor",
]


class MonitorMaster(Monitor):
    """Passes events on to the recorders that the config enables.

    Args:
        monitor_config: a `DeepSpeedMonitorConfig`.

    Raises:
        ModuleNotFoundError: an enabled recorder's package is missing.

    Example:
        >>> from deepspeed.monitor.config import get_monitor_config
        >>> monitor = MonitorMaster(get_monitor_config({"csv_monitor": {"enabled": False}}))
        >>> monitor.write_events([("Train/Samples/lr", 0.001, 32)])
    """

    def __init__(self, monitor_config: Any) -> None:
        super().__init__(monitor_config)
        self.tb_monitor: TensorBoardMonitor | None = None
        self.wandb_monitor: WandbMonitor | None = None
        self.csv_monitor: csvMonitor | None = None
        self.comet_monitor: CometMonitor | None = None
        self.enabled = monitor_config.enabled
        if not is_first_rank():
            return
        if monitor_config.tensorboard.enabled:
            self.tb_monitor = TensorBoardMonitor(monitor_config.tensorboard)
        if monitor_config.wandb.enabled:
            self.wandb_monitor = WandbMonitor(monitor_config.wandb)
        if monitor_config.csv_monitor.enabled:
            self.csv_monitor = csvMonitor(monitor_config.csv_monitor)
        if monitor_config.comet.enabled:
            self.comet_monitor = CometMonitor(monitor_config.comet)

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Record `(name, value, step)` triples with every recorder."""
        recorders = (self.tb_monitor, self.wandb_monitor, self.csv_monitor, self.comet_monitor)
        for recorder in recorders:
            if recorder is not None:
                recorder.write_events(event_list)
