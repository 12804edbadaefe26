# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint engine is: the object that stores single files, whatever stores them."""

from __future__ import annotations

import abc
import os
from dataclasses import dataclass
from typing import Any


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
    """Stores and reads single checkpoint files.

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
