# SPDX-License-Identifier: Apache-2.0
"""A collection of checkpoints made to do harm, and of damaged ones: each is refused, and nothing else happens."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint import reader
from deepspeed.checkpoint.atomic import resolve
from deepspeed.checkpoint.format import LATEST, MANIFEST
from deepspeed.checkpoint.reader import Folder, load_file
from deepspeed.checkpoint.writer import save_file
from deepspeed.utils.errors import DeepSpeedCheckpointError
from tests.helpers.checkpointing import engine, same, state_of, train
from tests.helpers.launching import UNDER_WINE

MARK = "side_effect"
ON_CPP = pytest.mark.skipif(UNDER_WINE, reason="Wine's C++ runtime dies of torch's exceptions")

# - pickles written by hand: what each opcode that can reach code may try


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def found(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


PICKLES = {
    "reduce": found("os", "system") + text(f"echo x > {MARK}") + b"\x85R",
    "inst": b"(" + text(f"echo x > {MARK}") + b"ios\nsystem\n",
    "obj": b"(" + found("os", "system") + text(f"echo x > {MARK}") + b"o",
    "newobj": found("subprocess", "Popen") + text("x") + b"\x85\x81",
    "newobj_ex": found("subprocess", "Popen") + text("x") + b"\x85}\x92",
    "stack_global": text("os") + text("system") + b"\x93" + text("x") + b"\x85R",
    "dotted": text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93",
    "extension": b"\x82\x01",
    "extension4": b"\x84\x01\x00\x00\x00",
    "persistent": text("os.system") + b"Q",
    "persistent_tuple": b"(" + text("storage") + found("os", "system") + text("0") + b"tQ",
    "build_on_a_function": found("torch._utils", "_rebuild_tensor_v2")
    + b"}"
    + text("__code__")
    + b"Nsb",
    "build_with_slots": found("argparse", "Namespace") + b")R(N}" + text("x") + b"K\x01stb",
    "getattr": found("builtins", "getattr") + found("os", "system") + text("x") + b"\x86R",
    "import": found("builtins", "__import__") + text("os") + b"\x85R",
    "eval": found("builtins", "eval") + text(f"open({MARK!r}, 'w')") + b"\x85R",
    "runpy": found("runpy", "_run_code") + text("x") + b"\x85R",
    "webbrowser": found("webbrowser", "open") + text("x") + b"\x85R",
    "torch_hub": found("torch.hub", "load") + text("x") + b"\x85R",
    "numpy_load": found("numpy", "load") + text(MARK) + b"\x85R",
    "numpy_objects": found("numpy", "dtype")
    + text("O8")
    + b"\x85R"
    + found("os", "system")
    + b"\x86",
    "a_bytearray_of_any_size": found("builtins", "bytearray")
    + b"\x8a\x06"
    + b"\xff" * 5
    + b"\x00"
    + b"\x85R",
    "a_frame_beyond_the_end": b"\x95" + struct.pack("<Q", 1 << 60),
    "bytes_beyond_the_end": b"\x8e" + struct.pack("<Q", 1 << 60),
    "text_beyond_the_end": b"\x8d" + struct.pack("<Q", 1 << 60),
    "a_bytearray_beyond_the_end": b"\x96" + struct.pack("<Q", 1 << 60),
    "nothing": b"",
    "an_empty_stack": b"0.",
    "a_memo_that_is_not_there": b"h\x07",
}


def in_zip(path: Path, pickled: bytes) -> Path:
    """torch's zip format around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)
    return path


def harmless(path: Path) -> bool:
    """Whether loading a file gives plain data, for the few of the collection that are only odd."""
    value = load_file(path)
    return not callable(value) and type(value).__module__ in ("builtins", "argparse", "collections")


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_reach_for_code_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if UNDER_WINE and name.startswith("persistent"):
        pytest.skip("Wine's C++ runtime dies of torch's exceptions")
    monkeypatch.chdir(tmp_path)
    path = in_zip(tmp_path / "f.pt", b"\x80\x04" + PICKLES[name] + b".")
    (tmp_path / "old.pt").write_bytes(b"\x80\x04" + PICKLES[name] + b".")
    for file in (path, tmp_path / "old.pt"):
        try:
            assert harmless(file), file
            assert name == "build_with_slots"
        except (DeepSpeedCheckpointError, AssertionError) as error:
            assert "f.pt" in str(error) or "old.pt" in str(error) or name.startswith("persistent")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.pt", "old.pt"]


# - tensors that are not what they say


def view(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Any:
    class Forged:
        def __reduce__(self) -> Any:
            typed = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (
                *(typed, offset, size, stride, False, OrderedDict()),
            )

    return Forged()


@ON_CPP
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (1 << 40,), (1,)),
        (1 << 40, (4,), (1,)),
        (-4, (4,), (1,)),
        (13, (4,), (1,)),
        (0, (4,), (-1,)),
        (0, (4, 4), (1 << 40, 1)),
        (0, (-4,), (1,)),
        (0, (1 << 62, 1 << 62), (1, 1)),
        (0, (4, 4), (1,)),
    ],
)
def test_tensors_outside_of_their_storage_are_refused(
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    tmp_path: Path,
) -> None:
    path = tmp_path / "f.pt"
    save_file(path, {"a": view(torch.zeros(16).untyped_storage(), offset, size, stride)})
    with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
        load_file(path)


@ON_CPP
@pytest.mark.parametrize("count", [-1, 0, 15, 17, 1 << 62])
def test_storages_of_another_size_than_their_record_are_refused(count: int, tmp_path: Path) -> None:
    storage = torch.zeros(16).untyped_storage()
    path = tmp_path / "f.pt"
    save_file(path, {"a": view(storage, 0, (16,), (1,))})
    with zipfile.ZipFile(path) as archive:
        records = {item.filename: archive.read(item) for item in archive.infolist()}
    pickled = records["archive/data.pkl"]
    old = b"K\x10"  # the number 16, first of all as the storage's count
    number = b"\x8a\x09" + count.to_bytes(9, "little", signed=True)
    assert pickled.count(old) >= 1
    records["archive/data.pkl"] = pickled.replace(old, number, 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
        load_file(path)


# - archives that are not what they say


def _rewritten(path: Path, change: Callable[[zipfile.ZipFile, dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        change(archive, records)


def twice(archive: zipfile.ZipFile, records: dict[str, bytes]) -> None:
    for name, data in records.items():
        archive.writestr(name, data)
    archive.fp.flush()
    archive.NameToInfo.pop("archive/data.pkl")  # or it warns
    archive.writestr("archive/data.pkl", b"\x80\x04}.")


def squeezed(archive: zipfile.ZipFile, records: dict[str, bytes]) -> None:
    for name, data in records.items():
        archive.writestr(name, data)
    archive.writestr("archive/data/9", bytes(50_000_000), zipfile.ZIP_DEFLATED)


def without_pickle(archive: zipfile.ZipFile, records: dict[str, bytes]) -> None:
    archive.writestr("archive/version", b"3\n")


def without_storage(archive: zipfile.ZipFile, records: dict[str, bytes]) -> None:
    for name, data in records.items():
        if "/data/" not in name:
            archive.writestr(name, data)


@ON_CPP
@pytest.mark.parametrize("change", [twice, squeezed, without_pickle, without_storage])
def test_forged_archives_are_refused(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    save_file(path, {"a": torch.ones(1000)})
    _rewritten(path, change)
    with pytest.raises(DeepSpeedCheckpointError):
        load_file(path)


def test_sizes_and_counts_of_the_directory_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    save_file(path, {"a": torch.ones(1000)})
    good = path.read_bytes()
    central = good.index(b"PK\x01\x02")
    places = {
        "offset": (central + 42, 4),
        "packed": (central + 20, 4),
        "size": (central + 24, 4),
        "name": (central + 28, 2),
        "extra": (central + 30, 2),
    }
    for what, (at, length) in places.items():
        for value in (b"\xff" * length, b"\x7f" * length):
            path.write_bytes(good[:at] + value + good[at + length :])
            with pytest.raises(DeepSpeedCheckpointError):
                load_file(path)
            assert path.exists(), what


# - folders


def checkpoint(root: Path, stage: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    made = engine(stage, "bf16")
    train(made, 0, 2)
    made.save_checkpoint(root)
    return made, state_of(made)


@pytest.mark.parametrize(
    "tag", ["../outside", "..", "/etc", "C:\\x", "a/../../b", "con", "a\0b", "x:stream", "", "."]
)
def test_tags_in_latest_lead_nowhere(tag: str, tmp_path: Path) -> None:
    made, state = checkpoint(tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "global_step2", tmp_path / "outside")
    (tmp_path / "run" / LATEST).write_bytes(tag.encode())
    with pytest.raises((DeepSpeedCheckpointError, ValueError, AssertionError)):
        made.load_checkpoint(tmp_path / "run")
    with pytest.raises((ValueError, AssertionError)):
        resolve(tmp_path / "run", tag)
    assert same(state_of(made), state) == []


def test_a_manifest_of_huge_or_strange_content_is_refused(tmp_path: Path) -> None:
    made, state = checkpoint(tmp_path)
    path = tmp_path / "global_step2" / MANIFEST
    good = json.loads(path.read_text(encoding="utf-8"))
    name = "mp_rank_00_model_states.pt"
    for entry in (
        {"size": 1 << 62, "crc32": "00000000"},
        {"size": -1, "crc32": good["files"][name]["crc32"]},
        {"size": good["files"][name]["size"], "crc32": ["x"]},
        {"size": good["files"][name]["size"], "md5": "0"},
        {"size": good["files"][name]["size"]},
        "text",
        None,
    ):
        path.write_text(json.dumps({"files": {**good["files"], name: entry}}), encoding="utf-8")
        with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
            made.load_checkpoint(tmp_path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
        made.load_checkpoint(tmp_path)
    assert same(state_of(made), state) == []


def test_links_are_neither_followed_nor_removed_by_a_save(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    run = tmp_path / "run"
    run.mkdir()
    try:
        for name in ("a.tmp", "b.old", "global_step2.tmp.link"):
            os.symlink(outside, run / name, target_is_directory=True)
    except OSError:
        pytest.skip("this account may not make links")
    checkpoint(run)
    assert (outside / "precious").read_bytes() == b"x"
    assert sorted(p.name for p in outside.iterdir()) == ["precious"]


def test_a_link_in_the_place_of_the_partial_folder_is_not_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    try:
        os.symlink(outside, run / "global_step2.tmp", target_is_directory=True)
    except OSError:
        pytest.skip("this account may not make links")
    if not (run / "global_step2.tmp").is_symlink():
        pytest.skip("the system says nothing of links")
    made = engine(2, "bf16")
    train(made, 0, 2)
    with pytest.raises(OSError, match="link"):
        made.save_checkpoint(run)
    assert not list(outside.iterdir())


# - damage


def _damages(data: bytes, step: int) -> list[bytes]:
    cut = [data[:keep] for keep in {0, 1, len(data) // 2, len(data) - 1} if keep < len(data)]
    flipped = []
    for at in range(0, len(data), step):
        flipped.append(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
    return cut + flipped


@ON_CPP
def test_whatever_is_cut_or_flipped_the_state_is_right_or_refused(tmp_path: Path) -> None:
    _, state = checkpoint(tmp_path / "run")
    fresh = engine(2, "bf16", seed=7)
    before = state_of(fresh)
    refused = 0
    files = [p for p in sorted((tmp_path / "run").rglob("*")) if p.is_file() and p.suffix != ".py"]
    assert len(files) == 4
    for path in files:
        good = path.read_bytes()
        for bad in _damages(good, 1 if len(good) < 100 else max(1, len(good) // 60)):
            path.write_bytes(bad)
            try:
                loaded = fresh.load_checkpoint(tmp_path / "run")[0] is not None
            except (DeepSpeedCheckpointError, ValueError, AssertionError):
                refused += 1
                assert same(state_of(fresh), before) == [], "a refused load changed the engine"
            else:
                assert loaded and same(state_of(fresh), state) == [], (path.name, len(bad))
                fresh = engine(2, "bf16", seed=7)
        path.write_bytes(good)
    assert refused > 150
    assert fresh.load_checkpoint(tmp_path / "run")[0] is not None


def test_a_folder_without_a_manifest_is_loaded_as_before(tmp_path: Path) -> None:
    _, state = checkpoint(tmp_path)
    (tmp_path / "global_step2" / MANIFEST).unlink()
    fresh = engine(2, "bf16", seed=7)
    fresh.load_checkpoint(tmp_path)
    assert same(state_of(fresh), state) == []
    assert Folder(tmp_path / "global_step2")._expected == {}


def test_manifests_with_sha256_are_still_compared(tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "t"
    folder.mkdir()
    save_file(folder / "f.pt", {"a": 1})
    digest = hashlib.sha256((folder / "f.pt").read_bytes()).hexdigest()
    entry = {"size": (folder / "f.pt").stat().st_size, "sha256": digest}
    (folder / MANIFEST).write_text(
        json.dumps({"format": 1, "files": {"f.pt": entry}}), encoding="utf-8"
    )
    assert Folder(folder).load("f.pt") == {"a": 1}
    entry["sha256"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps({"files": {"f.pt": entry}}), encoding="utf-8")
    with pytest.raises(DeepSpeedCheckpointError, match="sha256"):
        Folder(folder).load("f.pt")
    assert reader.SHA256 == "sha256"
