# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged checkpoint files are refused and have no effect; harmless old ones are read."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import struct
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch

from deepspeed.checkpoint import add_safe_classes, harmless, reader
from deepspeed.checkpoint.atomic import Crew, publish
from deepspeed.checkpoint.format import MANIFEST, PARTIAL_MARK
from deepspeed.checkpoint.reader import Folder, load_file
from deepspeed.checkpoint.writer import save_file
from deepspeed.utils.errors import DeepSpeedCheckpointError
from tests.helpers.launching import UNDER_WINE


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def with_pickle(path: Path, data: bytes, inside: str = "data.pkl") -> Path:
    """A file in torch's zip format around a pickle written by hand."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {item.filename: archive.read(item) for item in archive.infolist()}
    folder = next(iter(records)).split("/")[0]
    records[f"{folder}/{inside}"] = data
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


MARKER = "side_effect"
CPP_ERRORS = "Wine's C++ runtime dies of the exceptions that torch throws"


@pytest.mark.parametrize(
    "payload",
    [
        Calls(os.system, f"echo x > {MARKER}"),
        Calls(exec, f"open({MARKER!r}, 'w').write('x')"),
        Calls(eval, f"open({MARKER!r}, 'w')"),
        Calls(subprocess.Popen, ["touch", MARKER]),
        Calls(open, MARKER, "w"),
        Calls(getattr, "x", "upper"),
        Calls(__import__, "os"),
        Calls(torch.load, MARKER),
        Calls(torch.hub.load, "x/y", "z"),
        Calls(numpy.load, MARKER),
        Calls(pickle.loads, b"x"),
        Calls(bytearray, 1 << 40),
    ],
    ids=lambda p: getattr(p.call[0], "__name__", "call"),
)
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_calls_something_is_refused_by_name(
    payload: Any, as_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt"
    torch.save({"module": payload}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(DeepSpeedCheckpointError, match="refused") as caught:
        load_file(path)
    assert "add_safe_classes" in str(caught.value)
    assert getattr(payload.call[0], "__name__", "call") in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.pt"]


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def test_a_class_or_function_cannot_be_changed(tmp_path: Path) -> None:
    for target in (
        b"cargparse\nNamespace\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nTensor\n",
    ):
        attributes = b"(N}X\x01\x00\x00\x00zK\x01st"  # (None, {"z": 1}): set attributes by setattr
        path = with_pickle(tmp_path / "file.pt", opcodes(target, attributes, b"b"))
        with pytest.raises(DeepSpeedCheckpointError, match="a change of"):
            load_file(path)
    assert not hasattr(argparse.Namespace, "z")


def test_only_named_callables_are_called(tmp_path: Path) -> None:
    # an object from the file itself, here a tensor type's attribute, is no name of the list
    path = with_pickle(tmp_path / "file.pt", opcodes(b"cbuiltins\nlist\n", b")R", b")R"))
    with pytest.raises(DeepSpeedCheckpointError):
        load_file(path)


def test_dotted_names_do_not_reach_inside_allowed_modules(tmp_path: Path) -> None:
    for module, name in (
        ("torch", "os.system"),
        ("collections", "_sys.modules"),
        ("torch.serialization", "os"),
    ):
        data = (
            b"\x80\x04"
            + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
            + b"\x93."
        )
        with pytest.raises(DeepSpeedCheckpointError, match="refused"):
            load_file(with_pickle(tmp_path / "file.pt", data))


@pytest.mark.skipif(UNDER_WINE, reason=CPP_ERRORS)
def test_persistent_ids_give_tensors_only(tmp_path: Path) -> None:
    data = opcodes(b"X\x03\x00\x00\x00abc", b"Q")
    with pytest.raises((DeepSpeedCheckpointError, AssertionError)):
        load_file(with_pickle(tmp_path / "file.pt", data))


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "file.pt", b"\x80\x02N.", inside="constants.pkl")
    with pytest.raises(DeepSpeedCheckpointError, match="TorchScript"):
        load_file(path)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pt", {"a": torch.zeros(4)})
    with zipfile.ZipFile(path) as archive:
        records = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content if "data.pkl" in name else b"\0" * 10_000_000)
    with pytest.raises(DeepSpeedCheckpointError, match="compressed record"):
        load_file(path)


def test_a_record_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pt", {"a": torch.zeros(4)})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"PK\x01\x02"))
    data[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(bytes(data))
    with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
        load_file(path)


@pytest.mark.skipif(UNDER_WINE, reason=CPP_ERRORS)
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    storage = torch.zeros(4).untyped_storage()
    path = tmp_path / "file.pt"

    class Huge:
        def __reduce__(self) -> Any:
            view = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (
                view,
                0,
                (1 << 40,),
                (1,),
                False,
                collections.OrderedDict(),
            )

    torch.save({"a": Huge()}, path)
    with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
        load_file(path)


@pytest.mark.parametrize("keep", [0, 1, 10, 200, -30, -1])
def test_a_truncated_file_is_said_to_be_damaged(keep: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pt", {"a": torch.arange(100.0)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
        load_file(path)


def test_every_flipped_bit_is_found_through_the_manifest(tmp_path: Path) -> None:
    publish(
        tmp_path,
        "step",
        Crew(),
        lambda f: [save_file(f / "mp_rank_00_model_states.pt", {"a": torch.ones(2)})],
    )
    path = tmp_path / "step" / "mp_rank_00_model_states.pt"
    good = path.read_bytes()
    assert torch.equal(Folder(path.parent).load(path.name)["a"], torch.ones(2))
    for at in range(0, len(good), 7):
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        path.write_bytes(bytes(bad))
        with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
            Folder(path.parent).load(path.name)
    path.write_bytes(good[:-1])
    with pytest.raises(DeepSpeedCheckpointError, match="bytes where the manifest says"):
        Folder(path.parent).load(path.name)
    path.unlink()
    with pytest.raises(DeepSpeedCheckpointError, match="no such file"):
        Folder(path.parent).load(path.name)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"files": {"a": 1}}', '{"files": {"a": {"size": "x", "sha256": 1}}}']
)
def test_a_damaged_manifest_is_said_to_be_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(DeepSpeedCheckpointError, match="damaged"):
        Folder(tmp_path)


def test_names_in_a_manifest_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    folder = tmp_path / "step"
    folder.mkdir()
    noted = {"files": {"../secret": {"size": 1, "sha256": "0"}}}
    (folder / MANIFEST).write_text(json.dumps(noted), encoding="utf-8")
    assert Folder(folder).glob("*.pt") == []


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / PARTIAL_MARK).write_bytes(b"")
    with pytest.raises(DeepSpeedCheckpointError, match="did not finish"):
        Folder(tmp_path)


def test_plain_content_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {
        "tensor": torch.randn(3, 4),
        "low": torch.randn(3).to(torch.bfloat16),
        "param": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0),
        "numbers": [1, 2.5, True, None, 1j, -(10**30)],
        "texts": ("a", b"bytes", bytearray(b"more")),
        "set": {1, 2},
        "frozen": frozenset({3}),
        "ordered": collections.OrderedDict(a=1),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "namespace": argparse.Namespace(lr=0.1, nested={"a": [1]}),
        "array": numpy.arange(6.0).reshape(2, 3),
        "scalar": numpy.float64(1.5),
        "default": collections.defaultdict(list, a=[1]),
        "slice": slice(1, 2),
    }
    for as_zip in (True, False):
        path = tmp_path / f"{as_zip}.pt"
        torch.save(content, path, _use_new_zipfile_serialization=as_zip)
        back = load_file(path)
        assert list(back) == list(content)
        for key, value in content.items():
            assert type(back[key]) is type(value), key
            if isinstance(value, torch.Tensor):
                assert torch.equal(back[key], value) and back[key].dtype == value.dtype
            elif isinstance(value, numpy.ndarray):
                assert (back[key] == value).all()
            else:
                assert back[key] == value


@pytest.mark.parametrize("as_zip", [True, False])
def test_parameters_come_back_without_attributes_of_their_own(as_zip: bool, tmp_path: Path) -> None:
    param = torch.nn.Parameter(torch.arange(3.0), requires_grad=False)
    param.note = "mine"  # type: ignore[attr-defined]
    if as_zip:
        param.owner = threading.Lock()  # type: ignore[attr-defined]
    save_file(tmp_path / "file.pt", {"a": param, "again": param}, as_zip=as_zip)
    back = load_file(tmp_path / "file.pt")
    assert type(back["a"]) is torch.nn.Parameter and not back["a"].requires_grad
    assert torch.equal(back["a"], param) and back["again"] is back["a"]
    assert not hasattr(back["a"], "note")


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_a_storage_may_end_in_a_part_of_an_element(
    mmap: bool, as_zip: bool, tmp_path: Path
) -> None:
    odd = torch.zeros(41, dtype=torch.uint8)[:40].view(torch.float32)
    save_file(tmp_path / "file.pt", {"a": odd.fill_(2.5)}, as_zip=as_zip)
    assert torch.equal(load_file(tmp_path / "file.pt", mmap=mmap)["a"], odd)
    if mmap:  # and where another program wrote it
        torch.save({"a": odd}, tmp_path / "file.pt")
        assert torch.equal(load_file(tmp_path / "file.pt")["a"], odd)


ENDLESS = b"cbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R"


@pytest.mark.parametrize(
    "kind",
    [
        "builtins.list",
        "builtins.tuple",
        "builtins.set",
        "builtins.frozenset",
        "builtins.bytearray",
        "collections.deque",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
    ],
)
def test_containers_of_a_size_that_is_only_declared_are_refused(kind: str, tmp_path: Path) -> None:
    module, _, name = kind.rpartition(".")
    called, short = f"c{module}\n{name}\n".encode(), f"{module}\n{name}\n".encode()
    ways = [
        called + ENDLESS + b"\x85R",
        b"(" + called + ENDLESS + b"o",
        b"(" + ENDLESS + b"i" + short,
    ]
    if name != "bytearray":
        ways.append(called + ENDLESS + b"\x85\x81")
    for way in ways:
        path = with_pickle(tmp_path / "file.pt", opcodes(way))
        with pytest.raises(DeepSpeedCheckpointError, match="a range"):
            load_file(path)
    assert load_file(with_pickle(tmp_path / "file.pt", opcodes(ENDLESS))) == range(2**31 - 1)


def test_shared_storage_stays_shared(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    back = load_file(saved(tmp_path / "file.pt", {"a": whole[:4], "b": whole[2:6]}))
    back["a"][2] = -1
    assert back["b"][0] == -1


class Note:
    def __init__(self, text: str) -> None:
        self.text = text


def test_a_class_loads_after_it_was_declared_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_trusted", {})
    path = saved(tmp_path / "file.pt", {"note": Note("x")})
    with pytest.raises(DeepSpeedCheckpointError, match="Note"):
        load_file(path)
    add_safe_classes(Note)
    assert load_file(path)["note"].text == "x"


class Pair(NamedTuple):
    one: torch.Tensor
    two: int


def test_a_safe_class_may_hold_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_trusted", {})
    path = saved(tmp_path / "file.pt", Pair(torch.ones(2), 3))
    add_safe_classes(Pair)
    assert load_file(path).one.tolist() == [1, 1]


def test_everything_loads_where_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "file.pt", {"note": Note("x"), "list": Calls(sorted, [2, 1])})
    monkeypatch.setenv("DS_TRUST_CHECKPOINTS", "1")
    back = load_file(path)
    assert back["note"].text == "x" and back["list"] == [1, 2]


def test_objects_of_older_checkpoints_become_records(tmp_path: Path) -> None:
    text = (
        b"\x80\x02cdeepspeed.runtime.fp16.loss_scaler\nDynamicLossScaler\n)\x81}X\x09\x00\x00\x00cur_scaleG@p\x00\x00\x00"
        b"\x00\x00\x00sb."
    )
    back = load_file(with_pickle(tmp_path / "file.pt", text))
    assert isinstance(back, harmless.ScalerRecord) and back.cur_scale == 256.0
    stage = b"\x80\x02cdeepspeed.runtime.zero.config\nZeroStageEnum\nK\x02\x85R."
    assert load_file(with_pickle(tmp_path / "file.pt", stage)) == 2


def test_mapped_tensors_can_be_copied_out_before_the_file_goes(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pt", {"a": [torch.ones(3), {"b": torch.zeros(2)}]})
    kept = reader.own_memory(load_file(path))
    path.unlink()
    assert torch.equal(kept["a"][0], torch.ones(3)) and torch.equal(
        kept["a"][1]["b"], torch.zeros(2)
    )


@pytest.mark.skipif(UNDER_WINE, reason=CPP_ERRORS)
def test_a_stream_of_random_bytes_never_does_more_than_fail(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": [1, "x"]}, buffer)
    path = tmp_path / "file.pt"
    for _ in range(200):
        data = bytearray(buffer.getvalue())
        for _ in range(4):
            at = int(torch.randint(len(data), (), generator=generator))
            data[at] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(bytes(data))
        try:
            load_file(path)
        except DeepSpeedCheckpointError:
            pass
