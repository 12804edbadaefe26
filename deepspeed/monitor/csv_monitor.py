# SPDX-License-Identifier: Apache-2.0
"""CSV files, one a metric: `<output_path>/<job_name>/<name>.csv` with rows of step and value."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Event, Monitor, is_first_rank, plain

# Separators, spaces, and what a file name may not hold on Windows: the same names everywhere.
_FILE_NAME = str.maketrans({char: "_" for char in '/ \\:*?"<>|'})


class csvMonitor(Monitor):
    """Appends events to CSV files.

    A file's first row is `step,<last part of the event's name>`. It is written once: a resumed run
    goes on in the files of the first.

    Args:
        csv_config: section `csv_monitor`. An empty output path is the working folder.
    """

    def __init__(self, csv_config: Any) -> None:
        super().__init__(csv_config)
        self.filenames: list[str] = []
        self.enabled = csv_config.enabled
        self.output_path = csv_config.output_path
        self.job_name = csv_config.job_name
        self.log_dir: str | None = None
        if self.enabled and is_first_rank():
            self.log_dir = self.setup_log_dir()

    def setup_log_dir(self, base: str | None = None) -> str:
        """Make the folder of this run and return its path.

        Args:
            base: folder to use when the config names none (None); `~/csv_monitor` by default.
        """
        root = self.output_path
        if root is None:
            root = base if base is not None else Path.home() / "csv_monitor"
        folder = Path(root) / self.job_name
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Append each `(name, value, step)` to the file of its name."""
        if self.log_dir is None or not is_first_rank():
            return
        for name, value, step in event_list:
            path = Path(self.log_dir) / f"{name.translate(_FILE_NAME)}.csv"
            if str(path) not in self.filenames:
                self.filenames.append(str(path))
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if file.tell() == 0:
                    writer.writerow(["step", name.rsplit("/", 1)[-1]])
                writer.writerow([step, plain(value)])
