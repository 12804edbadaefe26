# SPDX-License-Identifier: Apache-2.0
"""Files of many small arrays: their bytes, and reading them back."""

from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest
import torch

from deepspeed.runtime.data_pipeline.data_sampling import indexed_dataset as files
from deepspeed.runtime.data_pipeline.data_sampling.utils import find_fit_int_dtype, split_index

ARRAYS = [[1, 2, 3], [[4, 5], [6, 7]], [9]]


def build(path, builder, dtype):
    made = builder(f"{path}.bin", dtype=dtype)
    for number, array in enumerate(ARRAYS):
        made.add_item(torch.tensor(array))
        if number != 1:
            made.end_document()
    made.finalize(f"{path}.idx")
    return str(path)


def test_mapped_files_have_the_public_layout(tmp_path):
    path = build(tmp_path / "a", files.MMapIndexedDatasetBuilder, np.uint16)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 6, 3, 3)
    expected += struct.pack("<3i3q3q", 3, 4, 1, 0, 6, 14, 0, 1, 3)
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<8H", 1, 2, 3, 4, 5, 6, 7, 9)
    dataset = files.MMapIndexedDataset(path)
    assert [array.tolist() for array in dataset[0:3]] == [[1, 2, 3], [4, 5, 6, 7], [9]]
    assert dataset.get(1, offset=1, length=2).tolist() == [5, 6] and dataset.dtype is np.uint16
    assert pickle.loads(pickle.dumps(dataset))[-1].tolist() == [9]
    dataset.close()


def test_older_files_keep_shapes(tmp_path):
    path = build(tmp_path / "a", files.IndexedDatasetBuilder, np.int32)
    for kind in ("lazy", "cached", "infer"):
        dataset = files.make_dataset(path, kind)
        if dataset.supports_prefetch:
            dataset.prefetch([1, 2])
        assert [array.tolist() for array in dataset[0:3]] == ARRAYS
        assert dataset.doc_idx.tolist() == [0, 1, 4]


@pytest.mark.parametrize("builder", [files.MMapIndexedDatasetBuilder, files.IndexedDatasetBuilder])
def test_merging_appends_arrays_and_documents(tmp_path, builder):
    path = build(tmp_path / "a", builder, np.int32)
    twice = builder(str(tmp_path / "b.bin"), dtype=np.int32)
    for _ in range(2):
        twice.merge_file_(path)
    twice.finalize(str(tmp_path / "b.idx"))
    one, two = (files.make_dataset(str(tmp_path / name), "infer") for name in "ab")
    assert [array.tolist() for array in two[0:6]] == 2 * [array.tolist() for array in one[0:3]]
    assert len(two.doc_idx) == 5
    narrow = builder(str(tmp_path / "c.bin"), dtype=np.int8)
    with pytest.raises(ValueError, match="dtype"):
        narrow.merge_file_(path)
    narrow.finalize(str(tmp_path / "c.idx"))


def test_broken_files_are_refused(tmp_path):
    path = build(tmp_path / "a", files.MMapIndexedDatasetBuilder, np.int64)
    with pytest.raises(ValueError, match="contiguous"):
        files.MMapIndexedDataset(path)[0:3:2]
    index, data = (tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="cut off"):
        files.MMapIndexedDataset(path)
    (tmp_path / "a.idx").write_bytes(index[:-1])
    with pytest.raises(ValueError, match="cut off"):
        files.MMapIndexedDataset(path)
    with pytest.raises(ValueError, match="no index of this format"):
        files.IndexedDataset(path)
    assert files.make_dataset(str(tmp_path / "none"), "infer") is None
    with pytest.raises(ValueError, match="cannot hold"):
        files.code(np.float32)


def test_small_helpers():
    assert [find_fit_int_dtype(*pair).__name__ for pair in ((0, 255), (0, 256), (-1, 128))] == [
        "uint8",
        "uint16",
        "int16",
    ]
    assert split_index(5, 7, 4) == [(5, 5), (5, 6), (6, 6), (6, 7)]
