# SPDX-License-Identifier: Apache-2.0
"""Small helpers of the analysis of data: the smallest integer dtype, equal shares, a dataset's files in one call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepspeed.utils.errors import explain

from .indexed_dataset import MMapIndexedDatasetBuilder, data_file_path, index_file_path


def find_fit_int_dtype(min_value: float, max_value: float) -> Any:
    """The smallest numpy integer dtype that holds both; an unsigned one unless the first is negative.

    Raises:
        ValueError: no dtype does.

    Example:
        >>> find_fit_int_dtype(0, 300).__name__, find_fit_int_dtype(-1, 100).__name__
        ('uint16', 'int8')
    """
    kinds: tuple[Any, ...] = (np.uint8, np.uint16, np.uint32, np.uint64)
    if min_value < 0:
        kinds = (np.int8, np.int16, np.int32, np.int64)
    for kind in kinds:
        if np.iinfo(kind).min <= min_value and max_value <= np.iinfo(kind).max:
            return kind
    raise ValueError(explain("no integer dtype holds these", got=f"{min_value} and {max_value}"))


def split_index(start_idx: int, end_idx: int, num_partitions: int) -> list[tuple[int, int]]:
    """Cut a range into `num_partitions` of about equal lengths.

    Example:
        >>> split_index(0, 10, 3)
        [(0, 3), (3, 6), (6, 10)]
    """
    span = end_idx - start_idx
    cuts = [start_idx + part * span // num_partitions for part in range(num_partitions + 1)]
    return list(itertools.pairwise(cuts))


def split_dataset(
    dataset: Any, num_workers: int, worker_id: int, num_threads: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Shares of the workers, and of this worker's threads in its own, as ranges of samples."""
    workers = split_index(0, len(dataset), num_workers)
    return workers, split_index(*workers[worker_id], num_threads)


def create_mmap_dataset_builder(fname: str, dtype: Any) -> MMapIndexedDatasetBuilder:
    """A builder of the dataset at a path without ending; the folder is made."""
    Path(fname).parent.mkdir(parents=True, exist_ok=True)
    return MMapIndexedDatasetBuilder(data_file_path(fname), dtype=dtype)


def close_mmap_dataset_builder(builder: MMapIndexedDatasetBuilder, fname: str) -> None:
    """End the document and write the index."""
    builder.end_document()
    builder.finalize(index_file_path(fname))


@contextlib.contextmanager
def new_dataset(fname: str, dtype: Any) -> Iterator[MMapIndexedDatasetBuilder]:
    """A builder of the dataset at a path without ending, whose files are complete at the end of the block."""
    builder = create_mmap_dataset_builder(fname, dtype)
    yield builder
    close_mmap_dataset_builder(builder, fname)
