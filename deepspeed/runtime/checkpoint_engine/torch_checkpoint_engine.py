# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files in torch's own format, written whole and read without running what they contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoint import stream
from ...checkpoint.archive import Archive
from ...checkpoint.atomic import Entry, Publication, disk, flush_files
from ...checkpoint.format import PARTIAL_SUFFIX
from ...checkpoint.joint import divide, of_first_ranks
from ...checkpoint.pace import Pace
from ...checkpoint.progress import Progress
from ...checkpoint.reader import load_file
from ...checkpoint.stream import MOCK, Settings, write_archive
from ...checkpoint.writer import compact, save_file, tensor_bytes
from .checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


class TorchCheckpointEngine(CheckpointEngine):
    """Stores files as `torch.save` does and reads them by a restricted `torch.load`."""

    @property
    def settings(self) -> Settings:
        """How files are written."""
        return Settings()

    def create(self, info: CheckpointCommitInfo) -> None:
        self.set_commit_info(info)

    def save(self, state_dict: Any, path: str) -> None:
        """Write beside the final place, flush, and rename there."""
        target = Path(path)
        if self.settings.type == MOCK:
            save_file(target, state_dict, settings=self.settings)
            return
        temporary = target.with_name(target.name + PARTIAL_SUFFIX)
        save_file(temporary, state_dict, settings=self.settings)
        disk.replace(temporary, target)

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_file(path, map_location if map_location is not None else "cpu")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        self._commit_info = None
        return True

    def store(self, publication: Publication, files: Mapping[str, Any], as_zip: bool) -> None:
        if not as_zip:
            if self.settings.data_parallel is not None:
                files = of_first_ranks(publication.crew, files)
            publication.begin(sum(map(tensor_bytes, files.values())))
            publication.finish(
                lambda: [
                    save_file(publication.partial / name, content, as_zip=False)
                    for name, content in files.items()
                ]
            )
            return
        archives = lay_out(publication, files)
        if self.settings.type == MOCK:
            write_all(publication.partial, archives, self.settings)
            return
        self.store_at_once(publication, archives, self.divide(publication, archives))

    def store_at_once(
        self,
        publication: Publication,
        archives: Mapping[str, Archive],
        shared: Sequence[str] | None,
    ) -> None:
        """Collectively write and publish this rank's files, of which it makes `shared` for others, too."""
        publication.begin(total_size(archives), shared)
        label = f"saving {publication.tag}" if publication.crew.rank == 0 else None
        publication.finish(
            lambda: write_all(publication.partial, archives, self.settings, label=label)
        )

    def divide(
        self, publication: Publication, archives: dict[str, Archive]
    ) -> Sequence[str] | None:
        """Collectively divide files among the ranks that have them, if so asked.

        Returns:
            The files that this rank makes for others, too; None on all ranks if no file is divided.
        """
        among = self.settings.data_parallel
        if among is None or not divide(publication.crew, archives, among, stream.BY_QUEUE):
            return None
        return [name for name, made in archives.items() if made.is_divided and made.leads]


class FastCheckpointEngine(TorchCheckpointEngine):
    """Writes as the section ``checkpoint.writer`` says.

    Args:
        config_params: a parsed configuration, or its dictionary of the section ``checkpoint``.
    """

    @property
    def settings(self) -> Settings:
        """How files are written."""
        section = getattr(self.config_params, "checkpoint_config", self.config_params) or {}
        writer = dict(section.get("writer") or {})
        known = {key: writer[key] for key in Settings.__dataclass_fields__ if key in writer}
        return replace(Settings(), **known)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Every rank may write a part, if so asked; which do is agreed upon at each save."""
        return dp_rank == 0 or self.settings.data_parallel is not None


def lay_out(publication: Publication, files: Mapping[str, Any]) -> dict[str, Archive]:
    """The files' archives; raises on every rank if one cannot pickle its own."""
    made: dict[str, Archive] = {}
    publication.crew.together(
        lambda: made.update({n: Archive.of(compact(content)) for n, content in files.items()})
    )
    return made


def total_size(archives: Mapping[str, Archive]) -> int:
    """Bytes of all files that this rank writes."""
    return sum(archive.own_size for archive in archives.values())


def write_all(
    folder: Path,
    archives: Mapping[str, Archive],
    settings: Settings,
    label: str | None = None,
    pace: Pace | None = None,
) -> list[Entry]:
    """Write files one after the other and flush them, and show how far this is under `label`; returns their entries."""
    progress = Progress(total_size(archives) if label else 0, label or "")
    try:
        entries = [
            write_archive(folder / name, archive, settings, progress, pace=pace, flush=False)
            for name, archive in archives.items()
        ]
        if settings.type != MOCK:
            flush_files([folder / name for name in archives])
        return [entry for entry in entries if archives[entry.name].leads]
    finally:
        progress.close()
