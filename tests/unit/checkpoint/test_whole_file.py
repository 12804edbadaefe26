# SPDX-License-Identifier: Apache-2.0
"""A file that is read at once is the file that is mapped: its content, its checks, its memory."""

from __future__ import annotations

import threading
import zlib
from pathlib import Path

import pytest
import torch

from deepspeed.checkpoint import reader, whole_file
from deepspeed.checkpoint.atomic import Crew, Entry, publish
from deepspeed.checkpoint.digest import of_file
from deepspeed.checkpoint.reader import Folder, load_file
from deepspeed.checkpoint.writer import save_file
from deepspeed.utils.errors import DeepSpeedCheckpointError


@pytest.mark.parametrize("by_torch", [False, True], ids=["ours", "torch"])
def test_a_file_read_at_once_is_the_file_mapped(
    by_torch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_file, "_LEAST", 0)
    monkeypatch.setattr(whole_file, "_CHUNK", 100_000)
    monkeypatch.setattr(whole_file, "_is_cached", lambda path, size: False)
    base = torch.randn(70_000)
    content = {
        "a": base,
        "b": base[10:20],
        "c": torch.randn(4, 5).t(),
        "low": torch.ones(7, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
        "param": torch.nn.Parameter(torch.ones(2)),
        "untyped": torch.arange(6, dtype=torch.uint8).untyped_storage(),
        "rest": [1, "x", None],
    }
    save = torch.save if by_torch else (lambda c, path: save_file(path, c))

    def write(folder: Path) -> list[Entry]:
        save(content, folder / "f.pt")
        return [Entry("f.pt", (folder / "f.pt").stat().st_size, of_file(folder / "f.pt"))]

    publish(tmp_path, "step", Crew(), write)
    found = Folder(tmp_path / "step", whole=True).load("f.pt")
    mapped = Folder(tmp_path / "step").load("f.pt")
    assert list(found) == list(mapped) == list(content)
    for key in ("a", "b", "c", "low", "empty", "param"):
        assert torch.equal(found[key], mapped[key]) and type(found[key]) is type(mapped[key])
        assert found[key].stride() == mapped[key].stride() and found[key].dtype is mapped[key].dtype
    storage = getattr(found["untyped"], "_untyped_storage", found["untyped"])
    assert storage.tolist() == list(range(6)) and found["rest"] == content["rest"]
    assert found["a"].data_ptr() + 40 == found["b"].data_ptr()
    assert not found["a"].untyped_storage().resizable()
    del mapped  # Windows writes no mapped file
    data = bytearray((tmp_path / "step" / "f.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "step" / "f.pt").write_bytes(data)
    with pytest.raises(DeepSpeedCheckpointError, match="its crc32 is another"):
        Folder(tmp_path / "step", whole=True).load("f.pt")


def test_only_large_files_that_leave_memory_to_others_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(whole_file.pages, "free_large", lambda: None)
    assert not whole_file.pays(path)
    monkeypatch.setattr(whole_file, "_LEAST", 1 << 20)
    assert whole_file.pays(path)
    monkeypatch.setattr(whole_file.pages, "free_large", lambda: 1 << 20)
    assert not whole_file.pays(path)
    monkeypatch.setattr(whole_file.pages, "free_large", lambda: 1 << 21)
    assert whole_file.pays(path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(1 << 40))
    assert not whole_file.pays(path)


@pytest.mark.parametrize("cached", [False, True])
def test_a_large_record_has_memory_of_its_own(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_file, "OWN_BLOCK", 1 << 16)
    monkeypatch.setattr(whole_file, "_CHUNK", 50_000)
    monkeypatch.setattr(whole_file, "_CACHED_CHUNK", 50_000)
    monkeypatch.setattr(whole_file, "_is_cached", lambda path, size: cached)
    content = {
        "first": torch.randn(30_000),
        "small": torch.randn(9),
        "second": torch.randn(40_001),
        "third": torch.randn(30_000),
    }
    path = tmp_path / "f.pt"
    save_file(path, content)
    whole = whole_file.read_whole(path)
    assert whole.crc32 == zlib.crc32(path.read_bytes())
    found = load_file(path, whole=whole)
    addresses = [block.data_ptr() for block in whole.blocks]
    for name, tensor in content.items():
        assert torch.equal(found[name], tensor)
        inside = [0 <= found[name].data_ptr() - address < 8192 for address in addresses]
        assert any(inside) or name == "small"


def test_a_record_in_two_blocks_is_a_copy_in_a_row() -> None:
    parts = [bytes(range(10)), bytes(range(10, 13)), bytes(range(13, 20))]
    blocks = [torch.frombuffer(bytearray(p), dtype=torch.uint8).untyped_storage() for p in parts]
    whole = whole_file.WholeFile(blocks, 0)
    assert whole.text(0, 20) == bytes(range(20)) and whole.text(9, 8) == bytes(range(9, 17))
    assert whole.record(3, 4).data_ptr() == blocks[0].data_ptr() + 3
    assert not whole.record(9, 8).resizable() and whole.text(20, 0) == b""


def test_what_was_begun_is_what_is_loaded_and_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_file, "_LEAST", 0)
    values = {"a": torch.randn(5000), "b": torch.randn(3)}

    def write(folder: Path) -> list[Entry]:
        return [save_file(folder / f"{name}.pt", value) for name, value in values.items()]

    publish(tmp_path, "step", Crew(), write)
    (tmp_path / "step" / "b.pt").write_bytes((tmp_path / "step" / "b.pt").read_bytes()[::-1])
    folder = Folder(tmp_path / "step", whole=True)
    folder.begin(["a.pt", "b.pt", "none.pt"])
    assert torch.equal(folder.load("a.pt"), values["a"]) and folder.is_in_memory("a.pt")
    with pytest.raises(DeepSpeedCheckpointError, match="its crc32 is another"):
        folder.load("b.pt")
    assert torch.equal(folder.load("a.pt"), values["a"]) and not folder.is_in_memory("a.pt")
    folder.begin(["b.pt"])
    folder.close()


def test_to_begin_does_not_wait_for_what_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_file, "_LEAST", 0)
    began, may_end = threading.Event(), threading.Event()

    def slow(path: Path) -> whole_file.WholeFile:
        began.set()
        assert may_end.wait(5)
        return whole_file.read_whole(path)

    monkeypatch.setattr(reader, "read_whole", slow)
    value = torch.randn(5000)
    publish(tmp_path, "step", Crew(), lambda folder: [save_file(folder / "a.pt", value)])
    folder = Folder(tmp_path / "step", whole=True)
    folder.begin(["a.pt"])
    assert began.wait(5) and not may_end.is_set()
    may_end.set()
    assert torch.equal(folder.load("a.pt"), value) and folder.is_in_memory("a.pt")
