# SPDX-License-Identifier: Apache-2.0
"""What killed saves left in a save folder: which of it is ours, what is put back, and what is removed."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.logging import logger
from .format import (
    MANIFEST,
    PARTIAL_MARK,
    PARTIAL_SUFFIX,
    REPLACED_MARK,
    REPLACED_SUFFIX,
    is_own_file,
)

if TYPE_CHECKING:
    from .atomic import Disk

_FOREIGN_PARTIAL_SECONDS = 3600.0

begun: set[Path] = set()
"""Partial folders (without links in their paths) that this process is at work on."""


def asides(final: Path) -> tuple[Path, Path]:
    """Where a tag's previous content may be while new content is published.

    The second is for when a folder of the user's has the first one's name.
    """
    return (
        final.with_name(final.name + REPLACED_SUFFIX),
        final.with_name(final.name + REPLACED_SUFFIX + REPLACED_SUFFIX),
    )


def free_aside(final: Path) -> Path:
    """The first of `asides` where nothing is; the last where both are taken, so that moving there fails."""
    return next((path for path in asides(final) if not path.exists()), asides(final)[-1])


def clear(folder: Path, partial: Path, disk: Disk) -> None:
    """Put back what was moved aside and not replaced, and remove the rest that killed saves left.

    Args:
        folder: of the tags.
        partial: the partial folder of the save that is about to begin: an older one of this name goes in any case.
        disk: makes the changes.
    """
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]
    for aside in folders:
        replaced = _replaced(aside)
        if aside != replaced and not replaced.exists() and _is_complete(aside):
            disk.replace(aside, replaced)
            disk.remove(replaced / REPLACED_MARK)
    for leftover in folders:
        if leftover.exists() and _is_leftover(leftover, partial):
            logger.warning(f"removing {leftover}, left by a save that did not finish")
            disk.remove_tree(leftover)
        elif leftover == _replaced(leftover) and (leftover / REPLACED_MARK).exists():
            disk.remove(leftover / REPLACED_MARK)  # killed before it was moved


def _replaced(aside: Path) -> Path:
    """The tag whose content a folder holds by its name; the folder itself if it is no such folder."""
    return aside.with_name(aside.name.removesuffix(REPLACED_SUFFIX).removesuffix(REPLACED_SUFFIX))


def _is_complete(folder: Path) -> bool:
    """Whether we moved a folder aside, and it is a tag's whole content."""
    held = [path.name for path in folder.iterdir()]
    ours = REPLACED_MARK in held and PARTIAL_MARK not in held
    return ours and any(is_own_file(name) for name in held if name != REPLACED_MARK)


def _is_leftover(folder: Path, partial: Path) -> bool:
    if folder.name.endswith(REPLACED_SUFFIX):
        replaced_by = _replaced(folder)
        if (folder / PARTIAL_MARK).exists():  # killed while it was removed
            return True
        return (replaced_by / MANIFEST).exists() and (folder / REPLACED_MARK).exists()
    if not folder.name.endswith(PARTIAL_SUFFIX):
        return False
    mark = folder / PARTIAL_MARK
    ours = mark.exists() or (folder / MANIFEST).exists() or not any(folder.iterdir())
    return ours and (folder == partial or not _is_being_written(mark))


def _is_being_written(mark: Path) -> bool:
    """Whether the process that made a partial folder may still be at work on it."""
    try:
        text = mark.read_text(encoding="utf-8")
        host, pid = text.split()
        age = time.time() - mark.stat().st_mtime
    except (OSError, ValueError):
        return False
    if not text.endswith("\n"):  # killed while it wrote this
        return False
    if host != socket.gethostname():
        return age < _FOREIGN_PARTIAL_SECONDS
    if int(pid) == os.getpid():
        return mark.parent.resolve() in begun
    import psutil

    return psutil.pid_exists(int(pid))
