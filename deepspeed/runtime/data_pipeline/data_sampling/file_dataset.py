# SPDX-License-Identifier: Apache-2.0
"""The older format of indexed datasets, ``TNTIDX``: arrays keep their shape and are read from the file one by one."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from deepspeed.utils.errors import explain

from .dataset_files import (
    FILE_MAGIC,
    VERSION,
    IndexReader,
    append_file,
    both_exist,
    check_same_dtype,
    code,
    data_file_path,
    index_file_path,
    numpy_dtype,
    slice_range,
)


class IndexedDataset(Dataset):
    """Integer arrays of any shape in a pair of files of the older format, each read when it is asked for.

    Args:
        path: the files' path without ``.bin`` and ``.idx``.

    Raises:
        ValueError: the index is none of this format, or is cut off.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = str(path)
        index = IndexReader(index_file_path(self.path), FILE_MAGIC)
        self.dtype = index.dtype("<u8")
        self.element_size = int(index.numbers("<u8", 1)[0])
        self._len, self.s, documents = (int(number) for number in index.numbers("<u8", 3))
        self.dim_offsets = index.numbers("<i8", self._len + 1)
        self.data_offsets = index.numbers("<i8", self._len + 1)
        self.sizes = index.numbers("<i8", self.s)
        self.doc_idx = index.numbers("<i8", documents)

    def check_index(self, i: int) -> None:
        """Raise IndexError unless there is an array `i`."""
        if not 0 <= i < self._len:
            raise IndexError(explain("index out of range", got=i, expected=f"0 to {self._len - 1}"))

    def _shape(self, i: int) -> tuple[int, ...]:
        return tuple(int(n) for n in self.sizes[self.dim_offsets[i] : self.dim_offsets[i + 1]])

    def _read(self, start: int, stop: int) -> np.ndarray:
        with open(data_file_path(self.path), "rb") as file:
            file.seek(start * self.element_size)
            return np.fromfile(file, self.dtype, stop - start)

    def __getitem__(self, idx: int | slice) -> Any:
        """One array, or a list of those of a slice (without a step)."""
        if isinstance(idx, slice):
            return [self[number] for number in slice_range(idx, len(self))]
        idx = idx + self._len if idx < 0 else idx
        self.check_index(idx)
        start, stop = int(self.data_offsets[idx]), int(self.data_offsets[idx + 1])
        return self._elements(start, stop).reshape(self._shape(idx))

    def _elements(self, start: int, stop: int) -> np.ndarray:
        return self._read(start, stop)

    def __len__(self) -> int:
        return self._len

    def num_tokens(self, index: int) -> int:
        """The first dimension of one array."""
        return self.size(index)

    def size(self, index: int) -> int:
        """The first dimension of one array."""
        return int(self.sizes[self.dim_offsets[index]])

    @staticmethod
    def exists(path: str) -> bool:
        """Whether both files are there."""
        return both_exist(path)

    @property
    def supports_prefetch(self) -> bool:
        """Whether `prefetch` keeps arrays in memory."""
        return False


class IndexedCachedDataset(IndexedDataset):
    """An `IndexedDataset` that can keep arrays in memory."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._kept: dict[int, np.ndarray] = {}

    @property
    def supports_prefetch(self) -> bool:
        """True."""
        return True

    def prefetch(self, indices: Sequence[int]) -> None:
        """Keep these arrays in memory, unless they all are there already."""
        starts = {int(self.data_offsets[i]): int(self.data_offsets[i + 1]) for i in set(indices)}
        if not all(start in self._kept for start in starts):
            self._kept = {start: self._read(start, stop) for start, stop in sorted(starts.items())}

    def _elements(self, start: int, stop: int) -> np.ndarray:
        kept = self._kept.get(start)
        return self._read(start, stop) if kept is None else kept.copy()


class IndexedDatasetBuilder:
    """Writes the files of an `IndexedDataset`, array by array.

    Args:
        out_file: path of the ``.bin`` file.
        dtype: integer dtype of the elements.
    """

    def __init__(self, out_file: str, dtype: Any = np.int32) -> None:
        self.dtype = numpy_dtype(dtype)
        self.element_size = np.dtype(self.dtype).itemsize
        self.out_file: IO[bytes] = open(out_file, "wb")  # noqa: SIM115 - finalize closes it
        self.data_offsets, self.dim_offsets = [0], [0]
        self.sizes: list[int] = []
        self.doc_idx = [0]

    def add_item(self, tensor: torch.Tensor) -> None:
        """Add a tensor; its shape is kept."""
        array = np.ascontiguousarray(tensor.detach().cpu().numpy(), self.dtype)
        self.out_file.write(array.tobytes())
        self.data_offsets.append(self.data_offsets[-1] + array.size)
        self.sizes += array.shape
        self.dim_offsets.append(self.dim_offsets[-1] + array.ndim)

    def end_document(self) -> None:
        """End a document; in this format, documents are counted in dimensions of arrays."""
        self.doc_idx.append(len(self.sizes))

    def merge_file_(self, another_file: str) -> None:
        """Append the arrays and documents of the dataset at a path without ending."""
        other = IndexedDataset(another_file)
        check_same_dtype(another_file, other.dtype, self.dtype)
        start = len(self.sizes)
        self.doc_idx += [start + int(at) for at in other.doc_idx[1:]]
        for offsets, more in (
            (self.data_offsets, other.data_offsets),
            (self.dim_offsets, other.dim_offsets),
        ):
            offsets += [offsets[-1] + int(at) for at in more[1:]]
        self.sizes += other.sizes.tolist()
        append_file(data_file_path(another_file), self.out_file)

    def finalize(self, index_file: str) -> None:
        """Close the data file and write the index to `index_file`."""
        self.out_file.close()
        counts = (len(self.data_offsets) - 1, len(self.sizes), len(self.doc_idx))
        with open(index_file, "wb") as file:
            file.write(FILE_MAGIC)
            file.write(struct.pack("<QQQ", VERSION, code(self.dtype), self.element_size))
            file.write(struct.pack("<QQQ", *counts))
            for numbers in (self.dim_offsets, self.data_offsets, self.sizes, self.doc_idx):
                file.write(np.asarray(numbers, "<i8").tobytes())
