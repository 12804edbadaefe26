# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files in torch's own format, written whole and read without running what they contain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoint.atomic import disk
from ...checkpoint.format import PARTIAL_SUFFIX
from ...checkpoint.reader import load_file
from ...checkpoint.writer import save_file
from .checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


class TorchCheckpointEngine(CheckpointEngine):
    """Stores files by `torch.save` and reads them by a restricted `torch.load`."""

    def create(self, info: CheckpointCommitInfo) -> None:
        self.set_commit_info(info)

    def save(self, state_dict: Any, path: str) -> None:
        """Write beside the final place, flush, and rename there."""
        target = Path(path)
        temporary = target.with_name(target.name + PARTIAL_SUFFIX)
        save_file(temporary, state_dict)
        disk.replace(temporary, target)

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_file(path, map_location if map_location is not None else "cpu")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        self.cleanup()
        return True
