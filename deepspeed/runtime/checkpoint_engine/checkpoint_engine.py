# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint engine is: the object that stores files, whatever stores them."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.atomic import Entry, Publication
from ...checkpoint.digest import of_file
from ...checkpoint.writer import tensor_bytes


@dataclass
class CheckpointCommitInfo:
    """The save that is to be made final.

    Attributes:
        tag: its name.
        save_dir: the folder of all tags.
        save_latest: whether `latest` is to point to it.
    """

    tag: Any
    save_dir: Any
    save_latest: bool


class CheckpointEngine(abc.ABC):
    """Stores and reads checkpoint files.

    A subclass that stores single files is enough to be `engine.checkpoint_engine`: `store` calls it for each.

    Args:
        config_params: settings of the implementation.
    """

    def __init__(self, config_params: Any = None) -> None:
        self.config_params = config_params
        self._commit_info: CheckpointCommitInfo | None = None

    @abc.abstractmethod
    def create(self, info: CheckpointCommitInfo) -> None:
        """A save begins."""

    @abc.abstractmethod
    def save(self, state_dict: Any, path: str) -> None:
        """Store one file."""

    @abc.abstractmethod
    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file."""

    @abc.abstractmethod
    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Everything was handed over; returns whether it is stored."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder and its parents."""
        os.makedirs(path, exist_ok=exist_ok)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this data-parallel rank stores the files that all ranks share."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether `commit` may return before everything is stored."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Whether tensors that share memory still do so after a load."""
        return True

    def set_commit_info(self, info: CheckpointCommitInfo) -> None:
        """Remember the save under way."""
        self._commit_info = info

    def get_commit_info(self) -> CheckpointCommitInfo | None:
        """The save under way."""
        return self._commit_info

    def cleanup(self) -> None:
        """Give up resources."""
        self._commit_info = None

    # - a training engine's saves

    def store(self, publication: Publication, files: Mapping[str, Any], as_zip: bool) -> None:
        """Collectively store this rank's files of one save, and publish it.

        Args:
            publication: where; not begun.
            files: content by file name.
            as_zip: torch's zip format rather than its old one.

        Raises:
            DeepSpeedCheckpointError: another rank failed (the failing rank raises its own error).
        """
        publication.begin(sum(map(tensor_bytes, files.values())))
        info = CheckpointCommitInfo(
            publication.tag, str(publication.save_dir), publication.latest is not None
        )

        def write() -> list[Entry]:
            self.create(info)
            paths = {publication.partial / name: content for name, content in files.items()}
            for path, content in paths.items():
                self.save(content, str(path))
            self.commit(info)
            return [_entry(path) for path in paths if path.is_file()]

        publication.finish(write)

    def finish(self) -> None:
        """Collectively complete a save that is still on its way; raises on all ranks if one could not store it."""
        self._commit_info = None

    def at_boundary(self, axis: Any) -> None:
        """Collectively over all ranks, after each optimizer step: complete what is ready."""
        if self.is_decoupled():
            self.finish()


def _entry(path: Path) -> Entry:
    return Entry(path.name, path.stat().st_size, of_file(path))
