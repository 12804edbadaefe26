# SPDX-License-Identifier: Apache-2.0
"""The checksum is zlib's, by whatever code it is taken, and pieces add up to the whole."""

from __future__ import annotations

import hashlib
import random
import zlib
from pathlib import Path

import pytest
import torch

from deepspeed.checkpoint import digest
from deepspeed.ops import native

HAS_LIBRARY = native.opened() is not None


@pytest.fixture(params=["native", "zlib"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not HAS_LIBRARY:
        pytest.skip("no native library here")
    if request.param == "zlib":
        monkeypatch.setattr(digest, "_of_library", lambda name, addresses: None)
    monkeypatch.setattr(digest, "_BY_LIBRARY", 0)
    return request.param


def test_the_sum_is_zlibs_for_any_length_place_and_start(way: str) -> None:
    source = random.Random(0)
    for length in [*range(300), *range(1020, 1300), 4097, 100_003]:
        data = source.randbytes(length + 8)
        begin, start = source.randrange(8), source.getrandbits(32)
        piece = memoryview(data)[begin : begin + length]
        assert digest.crc32(piece, start) == zlib.crc32(piece, start), length
        assert digest.crc32(bytearray(piece)) == zlib.crc32(piece)
    tensor = torch.arange(3000, dtype=torch.int32)
    assert digest.crc32_of_address(tensor.data_ptr(), 12_000, 7) == zlib.crc32(tensor.numpy(), 7)
    assert digest.crc32_of_address(0, 0, 9) == 9


def test_a_copy_is_summed_as_it_is_made(way: str) -> None:
    source = torch.randint(0, 256, (20_000,), dtype=torch.uint8)
    for start, length in [(0, 0), (0, 1), (0, 64), (0, 4096), (0, 12_345), (3, 9000), (64, 8192)]:
        for at in (0, 5):
            target = torch.full((20_000,), 7, dtype=torch.uint8)
            value = digest.copy_and_sum(source[start:].data_ptr(), target[at:].data_ptr(), length)
            copied = source[start : start + length]
            assert value == zlib.crc32(copied.numpy())
            assert torch.equal(target[at : at + length], copied)
            assert (target[:at] == 7).all() and (target[at + length :] == 7).all()


def test_the_library_has_the_functions() -> None:
    if not HAS_LIBRARY:
        pytest.skip("no native library here")
    assert digest._native() is not None
    assert digest._native_copy() is not None


def test_sums_of_pieces_combine_in_any_cut() -> None:
    source = random.Random(1)
    data = source.randbytes(20_000)
    for _ in range(50):
        cuts = sorted(source.randrange(20_001) for _ in range(4))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, 20_000], strict=True)]
        assert digest.combine_all((zlib.crc32(p), len(p)) for p in pieces) == zlib.crc32(data)
    # far beyond what can be tried: a run of zeros of 2^40 bytes equals 2^20 runs of 2^20
    once = zlib.crc32(bytes(1 << 20))
    total = once
    for doubling in range(20):
        total = digest.combine(total, total, 1 << (20 + doubling))
    assert digest.combine(total, 0, 0) == total
    assert digest._shift(1 << 40) == digest._times(digest._shift(1 << 39), digest._shift(1 << 39))


@pytest.mark.parametrize("size", [0, 1, 5000, (8 << 20) + 3])
def test_a_files_sum(size: int, way: str, tmp_path: Path) -> None:
    data = bytes(random.Random(2).randbytes(min(size, 5000)) * (size // 5000 + 1))[:size]
    (tmp_path / "f").write_bytes(data)
    assert digest.of_file(tmp_path / "f") == f"{zlib.crc32(data):08x}"
    assert digest.of_file(tmp_path / "f", digest.SHA256) == hashlib.sha256(data).hexdigest()
    with pytest.raises(ValueError, match="md5"):
        digest.of_file(tmp_path / "f", "md5")
