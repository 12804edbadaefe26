# SPDX-License-Identifier: Apache-2.0
"""What is written is plain, no larger than it need be, and shared where it was shared."""

from __future__ import annotations

import argparse
import enum
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from deepspeed.checkpoint import clone_tensors_for_torch_save
from deepspeed.checkpoint.writer import attributes, foreign_classes, plain, save_file, tensor_bytes


class Color(enum.Enum):
    RED = 1


class Opaque:
    pass


def test_configurations_become_plain() -> None:
    given = {
        "a": Color.RED,
        Color.RED: Path("x") / "y",
        "b": (1, [2.5, None]),
        "c": torch.float16,
        "d": {1},
    }
    assert plain(given) == {
        "a": 1,
        1: str(Path("x") / "y"),
        "b": (1, [2.5, None]),
        "c": torch.float16,
        "d": [1],
    }
    assert type(plain(torch.nn.Parameter(torch.ones(1)))) is torch.Tensor


def test_attributes_survive_torchs_restricted_reader(tmp_path: Path) -> None:
    save_file(tmp_path / "f.pt", [attributes(numel=3, start=5)])
    (back,) = torch.load(tmp_path / "f.pt", weights_only=True)
    assert (back.numel, back.start) == (3, 5) and dict(back) == {"numel": 3, "start": 5}


@pytest.mark.parametrize("as_zip", [True, False])
def test_small_views_of_large_storages_are_written_alone(as_zip: bool, tmp_path: Path) -> None:
    slab = torch.randn(1_000_000)
    view = slab[10:20]
    content = OrderedDict(
        a=view, again=slab[10:20], other=[slab[100:130].view(5, 6)], frozen=torch.ones(3)
    )
    entry = save_file(tmp_path / "f.pt", content, as_zip=as_zip)
    assert entry.size == (tmp_path / "f.pt").stat().st_size < 10_000
    back = torch.load(tmp_path / "f.pt", weights_only=True)
    assert torch.equal(back["a"], view) and torch.equal(back["other"][0], slab[100:130].view(5, 6))
    back["a"][0] = 7
    assert back["again"][0] == 7, "what was one tensor is one tensor"


def test_a_storage_that_is_used_whole_is_written_once(tmp_path: Path) -> None:
    slab = torch.randn(100_000)
    parts = list(slab.chunk(10))
    assert tensor_bytes([parts, slab[5:]]) == 400_000
    assert save_file(tmp_path / "f.pt", parts).size < 410_000


@pytest.mark.parametrize("numel", [1000, 700_000])
def test_the_entry_hashes_what_is_on_the_disk(numel: int, tmp_path: Path) -> None:
    entry = save_file(tmp_path / "f.pt", {"a": torch.randn(numel)})
    assert int(entry.crc32, 16) == zlib.crc32((tmp_path / "f.pt").read_bytes())


def test_objects_that_a_load_would_refuse_are_found_at_any_depth() -> None:
    given = {
        "a": [1, {"b": Opaque()}],
        "n": argparse.Namespace(x=Opaque(), y=1),
        "t": torch.ones(1),
        "s": {1, "x"},
    }
    assert foreign_classes(given) == {Opaque}
    assert foreign_classes({"f": len, "c": Opaque}) == {type(len), type}
    assert foreign_classes(argparse.Namespace(lr=0.1, sizes=(1, 2))) == set()


def test_clones_share_nothing_and_keep_structure() -> None:
    slab = torch.arange(10.0)
    state = torch.nn.Linear(2, 2).state_dict()
    given = {"a": slab[:2], "b": (slab[2:4], [1, "x"]), "c": state}
    made = clone_tensors_for_torch_save(given)
    assert made["a"].untyped_storage().nbytes() == 8
    assert torch.equal(made["b"][0], slab[2:4]) and made["b"][1] == [1, "x"]
    assert type(made["c"]) is OrderedDict and made["c"]._metadata == state._metadata
    slab[0] = -1
    assert made["a"][0] == 0
    assert not clone_tensors_for_torch_save(torch.nn.Parameter(slab)).requires_grad
