# SPDX-License-Identifier: Apache-2.0
"""Many small integer arrays in two files: ``.bin`` holds the numbers, ``.idx`` says where each array lies.

Two public formats: ``MMIDIDX`` is mapped into memory (Megatron's, with the dtype codes of DeepSpeed: 6, 7 and 8 are unsigned
integers); ``TNTIDX`` is older, is read from the file and keeps the shape of its items.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from deepspeed.utils.errors import explain

from .dataset_files import (
    FILE_MAGIC,
    MMAP_MAGIC,
    VERSION,
    IndexReader,
    append_file,
    both_exist,
    check_same_dtype,
    numpy_dtype,
    slice_range,
)
from .dataset_files import code as code
from .dataset_files import data_file_path as data_file_path
from .dataset_files import dtypes as dtypes
from .dataset_files import index_file_path as index_file_path
from .dataset_files import valid_dtypes as valid_dtypes
from .file_dataset import IndexedCachedDataset as IndexedCachedDataset
from .file_dataset import IndexedDataset as IndexedDataset
from .file_dataset import IndexedDatasetBuilder as IndexedDatasetBuilder


class MMapIndexedDataset(Dataset):
    """One-dimensional integer arrays of a pair of files, mapped into memory and so read when they are looked at.

    Args:
        path: the files' path without ``.bin`` and ``.idx``.
        skip_warmup: has no effect; nothing is read ahead.

    Raises:
        ValueError: the files are no such dataset, or one is cut off.
        FileNotFoundError: there are none.
    """

    def __init__(self, path: str, skip_warmup: bool = False) -> None:
        super().__init__()
        self._open(str(path))

    def _open(self, path: str) -> None:
        self._path = path
        index = IndexReader(index_file_path(path), MMAP_MAGIC)
        self._dtype = index.dtype("<u1")
        count, documents = (int(number) for number in index.numbers("<u8", 2))
        self._sizes = index.numbers("<i4", count)
        self._pointers = index.numbers("<i8", count)
        self._doc_idx = index.numbers("<i8", documents)
        data = Path(data_file_path(path))
        length = data.stat().st_size
        width = np.dtype(self._dtype).itemsize
        needed = int((self._pointers + self._sizes.astype(np.int64) * width).max()) if count else 0
        if length < needed:
            raise ValueError(
                explain(
                    f"{data} is cut off", got=f"{length} bytes", expected=f"{needed} by its index"
                )
            )
        # an empty file cannot be mapped
        self._data = np.memmap(data, np.uint8, "r") if length else np.empty(0, np.uint8)

    def close(self) -> None:
        """Let go of the file, which Windows otherwise neither renames nor deletes; arrays that were taken keep it."""
        self._data = np.empty(0, np.uint8)

    def __getstate__(self) -> str:
        return self._path

    def __setstate__(self, path: str) -> None:
        self._open(path)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, idx: int | slice) -> Any:
        """One array, or a list of those of a slice (without a step)."""
        if not isinstance(idx, slice):
            return self.get(idx)
        return [self.get(number) for number in slice_range(idx, len(self))]

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` elements of one array from `offset` on, or all from there."""
        size, pointer = int(self._sizes[idx]), int(self._pointers[idx])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(
                explain(
                    f"array {idx} has no such part",
                    got=f"offset {offset}, length {length}",
                    expected=f"within {size} elements",
                )
            )
        width = np.dtype(self._dtype).itemsize
        start = pointer + offset * width
        return np.asarray(self._data[start : start + length * width]).view(self._dtype)

    @property
    def sizes(self) -> np.ndarray:
        """Elements of each array."""
        return self._sizes

    def size(self, index: int) -> int:
        """Elements of one array."""
        return self._sizes[index]

    @property
    def doc_idx(self) -> np.ndarray:
        """Where documents begin, in arrays; the last number is where the last one ends."""
        return self._doc_idx

    def get_doc_idx(self) -> np.ndarray:
        """As `doc_idx`."""
        return self._doc_idx

    def set_doc_idx(self, doc_idx_: np.ndarray) -> None:
        """Use other documents."""
        self._doc_idx = doc_idx_

    @property
    def supports_prefetch(self) -> bool:
        """False: the system reads ahead."""
        return False

    @staticmethod
    def exists(path: str) -> bool:
        """Whether both files are there."""
        return both_exist(path)

    @property
    def dtype(self) -> Any:
        """Numpy dtype of the elements."""
        return self._dtype


class MMapIndexedDatasetBuilder:
    """Writes the files of a `MMapIndexedDataset`, array by array.

    Args:
        out_file: path of the ``.bin`` file.
        dtype: integer dtype of the elements.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/lengths"
        >>> builder = MMapIndexedDatasetBuilder(path + ".bin", dtype=np.uint16)
        >>> builder.add_item(torch.tensor([3, 1, 2]))
        >>> builder.end_document()
        >>> builder.finalize(path + ".idx")
        >>> MMapIndexedDataset(path)[0].tolist()
        [3, 1, 2]
    """

    def __init__(self, out_file: str, dtype: Any = np.int64) -> None:
        self._dtype = numpy_dtype(dtype)
        self._data_file: IO[bytes] = open(out_file, "wb")  # noqa: SIM115 - finalize closes it
        self._sizes: list[int] = []
        self._doc_idx = [0]

    def add_item(self, tensor: torch.Tensor) -> None:
        """Add a tensor of any shape; it comes back flat."""
        self.add_item_numpy(tensor.detach().cpu().numpy())

    def add_item_numpy(self, np_array: Any) -> None:
        """Add an array of any shape; it comes back flat."""
        array = np.asarray(np_array)
        self._write(array)
        self._sizes.append(array.size)

    def add_items(self, arr_list: Iterable[Any]) -> None:
        """Add several arrays."""
        for array in arr_list:
            self.add_item_numpy(array)

    def add_numbers(self, values: np.ndarray) -> None:
        """Add an array of one element for each of `values`."""
        self._write(values)
        self._sizes += [1] * values.size

    def _write(self, array: np.ndarray) -> None:
        self._data_file.write(np.ascontiguousarray(array, self._dtype).tobytes())

    def end_document(self) -> None:
        """End a document behind the arrays so far."""
        self._doc_idx.append(len(self._sizes))

    def merge_file_(self, another_file: str) -> None:
        """Append the arrays and documents of the dataset at a path without ending.

        Raises:
            ValueError: its dtype is another.
        """
        other = MMapIndexedDataset(another_file)
        other.close()
        check_same_dtype(another_file, other.dtype, self._dtype)
        start = len(self._sizes)
        self._sizes += other.sizes.tolist()
        self._doc_idx += [start + int(at) for at in other.doc_idx[1:]]
        append_file(data_file_path(another_file), self._data_file)

    def finalize(self, index_file: str) -> None:
        """Close the data file and write the index to `index_file`."""
        self._data_file.close()
        sizes = np.asarray(self._sizes, "<i8")
        if sizes.size and sizes.max() > np.iinfo(np.int32).max:
            raise ValueError(
                explain(
                    "an array is too long for the format", got=sizes.max(), expected="below 2**31"
                )
            )
        ends = np.cumsum(sizes) * np.dtype(self._dtype).itemsize
        pointers = np.concatenate([np.zeros(1, "<i8"), ends])[: sizes.size]
        with open(index_file, "wb") as file:
            file.write(MMAP_MAGIC + struct.pack("<QB", VERSION, code(self._dtype)))
            file.write(struct.pack("<QQ", sizes.size, len(self._doc_idx)))
            file.write(sizes.astype("<i4").tobytes())
            file.write(pointers.astype("<i8").tobytes())
            file.write(np.asarray(self._doc_idx, "<i8").tobytes())


_KINDS: dict[str, tuple[type[Any], bytes]] = {
    "lazy": (IndexedDataset, FILE_MAGIC),
    "cached": (IndexedCachedDataset, FILE_MAGIC),
    "mmap": (MMapIndexedDataset, MMAP_MAGIC),
}


def get_available_dataset_impl() -> list[str]:
    """The names that `make_dataset` takes: "lazy" and "cached" for the older format, "mmap"."""
    return list(_KINDS)


def dataset_exists(path: str, impl: str) -> bool:
    """Whether both files are there."""
    return both_exist(path)


def infer_dataset_impl(path: str) -> str | None:
    """The name of the format of the files at `path`: "mmap" or "cached"; None where there are none, or of no such format."""
    if not both_exist(path):
        return None
    with open(index_file_path(path), "rb") as file:
        start = file.read(9)
    if start.startswith(FILE_MAGIC):
        return "cached"
    return "mmap" if start == MMAP_MAGIC else None


def make_dataset(path: str, impl: str, skip_warmup: bool = False) -> Any:
    """Open the dataset at a path without ending; None where there is none.

    Args:
        path: the files' path without ``.bin`` and ``.idx``.
        impl: "lazy", "cached", "mmap", or "infer".
        skip_warmup: has no effect.

    Raises:
        ValueError: an unknown `impl`, or the files are of another format.
    """
    kind = infer_dataset_impl(path) if impl == "infer" else impl
    if not both_exist(path) or kind is None:
        return None
    if kind not in _KINDS:
        raise ValueError(
            explain("unknown kind of dataset", got=impl, expected=", ".join([*_KINDS, "infer"]))
        )
    return _KINDS[kind][0](path)


def make_builder(out_file: str, impl: str, vocab_size: int | None = None) -> Any:
    """A builder of datasets of tokens: of 16 bits where `vocab_size` is below 65500, else of 32."""
    if impl != "mmap":
        return IndexedDatasetBuilder(out_file)
    small = vocab_size is not None and vocab_size < 65500
    return MMapIndexedDatasetBuilder(out_file, dtype=np.uint16 if small else np.int32)
