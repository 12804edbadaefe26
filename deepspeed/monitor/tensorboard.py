# SPDX-License-Identifier: Apache-2.0
"""TensorBoard event files in `<output_path>/<job_name>`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Event, Monitor, is_first_rank, plain, require


class TensorBoardMonitor(Monitor):
    """Writes events as TensorBoard scalars.

    Args:
        tensorboard_config: section `tensorboard`. An empty output path is the working folder.

    Raises:
        ModuleNotFoundError: the package `tensorboard` is missing.
    """

    def __init__(self, tensorboard_config: Any) -> None:
        super().__init__(tensorboard_config)
        self.summary_writer: Any = None
        self.enabled = tensorboard_config.enabled
        self.output_path = tensorboard_config.output_path
        self.job_name = tensorboard_config.job_name
        if self.enabled and is_first_rank():
            self.get_summary_writer()

    def get_summary_writer(self, base: str | None = None) -> Any:
        """Make the writer of this run and return it.

        Args:
            base: folder to use when the config names none (None); `~/tensorboard` by default.
        """
        if self.summary_writer is None:
            require("tensorboard", "tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            root = self.output_path
            if root is None:
                root = base if base is not None else Path.home() / "tensorboard"
            folder = Path(root) / self.job_name
            folder.mkdir(parents=True, exist_ok=True)
            self.summary_writer = SummaryWriter(log_dir=str(folder))
        return self.summary_writer

    def write_events(self, event_list: Sequence[Event], flush: bool = True) -> None:
        """Record each `(name, value, step)`, and put it on disk unless told otherwise."""
        if self.summary_writer is None or not is_first_rank():
            return
        for name, value, step in event_list:
            self.summary_writer.add_scalar(name, plain(value), step)
        if flush:
            self.flush()

    def flush(self) -> None:
        """Put on disk what was recorded."""
        if self.summary_writer is not None and is_first_rank():
            self.summary_writer.flush()
