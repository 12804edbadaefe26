# SPDX-License-Identifier: Apache-2.0
"""The writers for torch.save: what was saved is what is loaded, however the buffer cuts it."""

from __future__ import annotations

import io

import pytest
import torch

from deepspeed.io import FastFileWriter, FastFileWriterConfig, MockFileWriter, PyFileWriter
from deepspeed.ops.aio import aio_handle, locked_tensor

STATE = {"a": torch.arange(100_001), "b": {"c": torch.randn(33, 77).bfloat16()}, "d": "text"}


def fast(path, nbytes=8192, double_buffer=True):
    buffer = locked_tensor(nbytes, torch.uint8)
    return FastFileWriter(path, FastFileWriterConfig(aio_handle(4096, 4), buffer, double_buffer))


def same(path):
    loaded = torch.load(path, weights_only=True)
    return (
        torch.equal(loaded["a"], STATE["a"])
        and torch.equal(loaded["b"]["c"], STATE["b"]["c"])
        and loaded["d"] == "text"
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nbytes", [1001, 8192, 1 << 22])
@pytest.mark.parametrize("double_buffer", [True, False])
def test_torch_saves_through_the_queue(folder, zipped, nbytes, double_buffer):
    path = folder / "state.pt"
    with fast(path, nbytes, double_buffer) as writer:
        torch.save(STATE, writer, _use_new_zipfile_serialization=zipped)
    assert same(path)
    assert writer.nbytes == path.stat().st_size


def test_torch_saves_through_python(folder):
    with PyFileWriter(folder / "state.pt") as writer:
        torch.save(STATE, writer)
        writer.flush()
    assert same(folder / "state.pt")


def test_the_mock_counts(folder):
    writer, memory = MockFileWriter(folder / "none.pt"), io.BytesIO()
    torch.save(STATE, writer)
    torch.save(STATE, memory)
    # the archive holds its own name, which has another length
    assert abs(writer.nbytes - memory.getbuffer().nbytes) < 1000
    assert (folder / "none.pt").stat().st_size == 0


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_storages_are_bytes_after_their_number_of_elements(folder):
    tensor = torch.arange(5, dtype=torch.int16)
    with fast(folder / "s") as writer:
        written = writer.save_torch_storage_object_list([tensor.storage()], True)
        writer.save_torch_storage_object_list([tensor.untyped_storage()], False)
    raw = tensor.numpy().tobytes()
    assert written == 18
    assert (folder / "s").read_bytes() == (5).to_bytes(8, "little") + raw + raw


def test_failures_reach_the_caller(folder):
    with pytest.raises(FileNotFoundError):
        fast(folder / "gone" / "x")
    with pytest.raises(ValueError, match="too small"):
        fast(folder / "y", 1)


@pytest.mark.parametrize("make", [PyFileWriter, MockFileWriter])
def test_statistics_say_how_much_was_written(make, tmp_path, capsys):
    writer = make(tmp_path / "file")
    writer.write(b"12345")
    writer.write(bytearray(7))
    writer.close()
    writer._dump_state()
    assert writer.nbytes == 12
    assert f"{make.__name__}: 12 bytes by 2 writes" in capsys.readouterr().out
