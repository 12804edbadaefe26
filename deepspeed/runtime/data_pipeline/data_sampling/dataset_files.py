# SPDX-License-Identifier: Apache-2.0
"""What both formats of indexed datasets have in common: their dtypes, their paths, reading an index with care."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from deepspeed.utils.errors import explain

MMAP_MAGIC = b"MMIDIDX\x00\x00"
FILE_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
_COPY_BYTES = 16 << 20

# code in the files -> (numpy dtype, torch dtype where torch has had one for long)
dtypes: dict[int, tuple[Any, torch.dtype | None]] = {
    1: (np.uint8, torch.uint8),
    2: (np.int8, torch.int8),
    3: (np.int16, torch.int16),
    4: (np.int32, torch.int32),
    5: (np.int64, torch.int64),
    6: (np.uint16, None),
    7: (np.uint32, None),
    8: (np.uint64, None),
}
valid_dtypes = {kind for pair in dtypes.values() for kind in pair if kind is not None}


def code(dtype: Any) -> int:
    """The number of a numpy or torch dtype in the files.

    Raises:
        ValueError: the files cannot hold it.
    """
    for number, (of_numpy, of_torch) in dtypes.items():
        same = dtype is of_torch if isinstance(dtype, torch.dtype) else np.dtype(dtype) == of_numpy
        if same:
            return number
    raise ValueError(
        explain(
            "an indexed dataset cannot hold this dtype",
            got=dtype,
            expected=", ".join(np.dtype(pair[0]).name for pair in dtypes.values()),
        )
    )


def numpy_dtype(dtype: Any) -> Any:
    """The numpy dtype of a numpy or torch dtype that the files can hold."""
    return dtypes[code(dtype)][0]


def index_file_path(prefix_path: str) -> str:
    """The index of the dataset at a path without ending."""
    return f"{prefix_path}.idx"


def data_file_path(prefix_path: str) -> str:
    """The numbers of the dataset at a path without ending."""
    return f"{prefix_path}.bin"


def both_exist(path: Any) -> bool:
    """Whether there is an index and a data file at a path without ending."""
    return Path(index_file_path(path)).exists() and Path(data_file_path(path)).exists()


def slice_range(part: slice, length: int) -> range:
    """The numbers that a slice of a dataset stands for.

    Raises:
        ValueError: it has a step.
    """
    start, stop, step = part.indices(length)
    if step != 1:
        raise ValueError(
            explain("slices of an indexed dataset must be contiguous", got=f"step {step}")
        )
    return range(start, stop)


def check_same_dtype(path: str, dtype: Any, expected: Any) -> None:
    """Raise ValueError unless the dataset at `path` has the dtype of the one that it is to be appended to."""
    if dtype != expected:
        raise ValueError(
            explain(
                f"{path} cannot be appended: its dtype is another",
                got=np.dtype(dtype).name,
                expected=np.dtype(expected).name,
            )
        )


class IndexReader:
    """Numbers of an index file, one after the other; it says when there are fewer than were promised."""

    def __init__(self, path: str, magic: bytes) -> None:
        self.path = path
        self._data = Path(path).read_bytes()
        self._at = len(magic)
        if self._data[: len(magic)] != magic or self.numbers("<u8", 1)[0] != VERSION:
            raise ValueError(
                explain(
                    f"{path} is no index of this format",
                    got=repr(self._data[:9]),
                    expected=f"{magic!r}, version {VERSION}",
                    fix="make_dataset(path, 'infer') finds out which format it is",
                )
            )

    def numbers(self, form: str, count: int) -> np.ndarray:
        """The next `count` numbers of a little-endian dtype."""
        size = np.dtype(form).itemsize * int(count)
        if self._at + size > len(self._data):
            raise ValueError(
                explain(
                    f"{self.path} is cut off",
                    got=f"{len(self._data)} bytes",
                    expected=f"at least {self._at + size}",
                )
            )
        found = np.frombuffer(self._data, form, int(count), self._at)
        self._at += size
        return found

    def dtype(self, form: str) -> Any:
        """The dtype that the next number stands for."""
        number = int(self.numbers(form, 1)[0])
        if number not in dtypes:
            raise ValueError(explain(f"{self.path} names an unknown dtype", got=number))
        return dtypes[number][0]


def append_file(path: str, file: IO[bytes]) -> None:
    """Copy a file behind what was written to another."""
    with open(path, "rb") as source:
        while part := source.read(_COPY_BYTES):
            file.write(part)
