# SPDX-License-Identifier: Apache-2.0
"""Lists of checkpoint files, and joining what several of them hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..utils.errors import explain
from .constants import FP16_ZERO_FILE_PREFIX, ZERO_FILE_PREFIX
from .format import natural_key

T = TypeVar("T")

_OPTIM = ("_optim_states.pt",)
_ZERO_PREFIXES = (ZERO_FILE_PREFIX, FP16_ZERO_FILE_PREFIX, "bf16_" + ZERO_FILE_PREFIX)


def check(holds: bool, what: str, **details: Any) -> None:
    """Raise AssertionError with an explanation unless `holds`."""
    if not holds:
        raise AssertionError(explain(what, **details))


def basic_folder_validation(dir: str | os.PathLike[str]) -> None:
    """Raise AssertionError unless `dir` is a folder."""
    check(os.path.exists(dir), f"{dir} path does not exist")
    check(os.path.isdir(dir), f"{dir} is not a folder")


def get_files(dir: str | os.PathLike[str]) -> list[str]:
    """Paths of all files below a folder, in natural order."""
    return sorted((str(p) for p in Path(dir).rglob("*") if p.is_file()), key=natural_key)


def get_files_with_prefix(all_files: Sequence[str], prefix: str) -> list[str]:
    """Those whose file names begin so, in natural order."""
    found = (path for path in all_files if os.path.basename(path).startswith(prefix))
    return sorted(found, key=natural_key)


def validate_files(file_list: Sequence[str]) -> None:
    """Print the files that are missing."""
    for path in file_list:
        if not os.path.isfile(path):
            print(f"Error: {path} is not existent")


def get_zero_files(dir: str | os.PathLike[str]) -> list[str]:
    """Paths of a folder's optimizer shards, data-parallel rank by rank."""
    files = [path for path in get_files(dir) if path.endswith(_OPTIM)]
    found = (get_files_with_prefix(files, prefix) for prefix in _ZERO_PREFIXES)
    return next(filter(None, found), [])


def partition_data(data_list: Sequence[T], num_partitions: int) -> list[list[T]]:
    """Cut a list into equal runs.

    Raises:
        AssertionError: it does not divide.
    """
    check(
        len(data_list) % num_partitions == 0,
        "a list cannot be cut into equal parts",
        got=f"{len(data_list)} items for {num_partitions} parts",
    )
    size = len(data_list) // num_partitions
    return [list(data_list[i * size : (i + 1) * size]) for i in range(num_partitions)]


def merge_state(state_a: Any, state_b: Any, key_list: Sequence[str] = ()) -> Any:
    """Join two states of the same form: tensors end to end along dimension 0, of other values the first.

    Args:
        state_a, state_b: nested dicts and lists of tensors and values.
        key_list: where in the whole they are, for messages.

    Raises:
        ValueError: they are not of the same form.
    """
    where = ".".join(map(str, key_list)) or "the state"
    if type(state_a) is not type(state_b):
        raise ValueError(
            explain(
                f"Cannot merge two states of types {type(state_a)} and type {type(state_b)}",
                got=f"them under {where}",
            )
        )
    if isinstance(state_a, dict):
        both = {**state_a, **state_b}
        for key in state_a.keys() & state_b.keys():
            both[key] = merge_state(state_a[key], state_b[key], [*key_list, str(key)])
        return type(state_b)(both)
    if isinstance(state_a, (list, tuple)):
        if len(state_a) != len(state_b):
            raise ValueError(
                f"Cannot merge lists of different lengths, a = {len(state_a)} b = {len(state_b)} ({where})"
            )
        return type(state_a)(
            merge_state(a, b, [*key_list, str(i)])
            for i, (a, b) in enumerate(zip(state_a, state_b, strict=True))
        )
    if isinstance(state_a, torch.Tensor) and state_a.dim() > 0:
        return torch.cat([state_a, state_b], 0)
    return state_a
