# SPDX-License-Identifier: Apache-2.0
"""Files that we lay out ourselves are what torch reads, zip programs accept, and the manifest says."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint import archive, stream
from deepspeed.checkpoint.archive import Archive
from deepspeed.checkpoint.progress import Progress
from deepspeed.checkpoint.reader import load_file
from deepspeed.checkpoint.stream import Settings, write_archive
from deepspeed.checkpoint.writer import save_file

SETTINGS = [Settings(), Settings(type="PYTHON"), Settings(io_buffer_size=1 << 20)]


def content() -> dict[str, Any]:
    torch.manual_seed(3)
    whole = torch.randn(40_000)
    return {
        "whole": whole,
        "view": whole[:30_000],
        "transposed": torch.randn(100, 300).t(),
        "small": torch.arange(5),
        "empty": torch.zeros(0),
        "low": torch.randn(70_001).to(torch.bfloat16),
        "bytes": torch.arange(200, dtype=torch.uint8),
        "param": torch.nn.Parameter(torch.ones(3)),
        "complex": torch.randn(3, dtype=torch.cfloat),
        "nested": OrderedDict(a=[torch.ones(20_000, dtype=torch.int8), (1, "x", None)]),
        "large": torch.randn(1_500_001),
    }


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, item in items for k, v in flat(item, f"{name}.{key}").items()}


def assert_same(found: Any, expected: Any) -> None:
    one, two = flat(found), flat(expected)
    assert list(one) == list(two)
    for key, value in two.items():
        assert type(one[key]) is type(value), key
        if isinstance(value, torch.Tensor):
            assert one[key].dtype == value.dtype and one[key].stride() == value.stride(), key
            assert torch.equal(one[key], value), key
        else:
            assert one[key] == value, key


@pytest.mark.parametrize("settings", SETTINGS, ids=["fast", "python", "small_buffer"])
@pytest.mark.parametrize("by_queue", [0, 1 << 40], ids=["queue", "in_a_row"])
def test_every_reader_takes_the_file(
    settings: Settings, by_queue: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BY_QUEUE", by_queue)
    monkeypatch.setattr(stream, "_CHUNK", 1 << 20)
    expected, path = content(), tmp_path / "f.pt"
    seen = Progress()
    entry = write_archive(path, Archive.of(expected), settings, seen)
    data = path.read_bytes()
    assert (entry.size, entry.crc32) == (len(data), f"{zlib.crc32(data):08x}")
    assert seen.done == len(data)
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        assert all(item.header_offset + item.file_size <= len(data) for item in opened.infolist())
    for options in ({}, {"mmap": True}):
        assert_same(torch.load(path, weights_only=True, **options), expected)
    found = load_file(path)
    assert_same(found, expected)
    assert found["whole"].data_ptr() == found["view"].data_ptr()


def test_equal_states_give_equal_files_and_large_records_begin_on_pages(tmp_path: Path) -> None:
    first, second = (
        save_file(tmp_path / name, content(), settings=Settings(type=kind))
        for name, kind in (("a", "FAST"), ("b", "PYTHON"))
    )
    assert first.crc32 == second.crc32
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for record in Archive.of(content()).records:
        assert record.begin % (4096 if record.size >= archive.LARGE else 64) == 0


@pytest.mark.parametrize("limit", [1, 1000, 100_000])
def test_sizes_and_places_beyond_32_bits(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A lower limit writes the wide fields into a small file; readers honour them only where the narrow ones overflow.
    monkeypatch.setattr(archive, "_LIMIT32", limit)
    made = Archive.of(content())
    wide = [record for record in made.records if record.size >= limit]
    assert wide
    for record in made.records:
        record.crc = 0
        header = archive._local_header(record)
        length, extra = struct.unpack("<HH", header[26:30])
        assert record.header + 30 + length + extra == record.begin
        central = archive._central_header(record, known=True)
        fields = central[46 + length :]
        values = [v for v, big in _wide_values(record, limit) if big]
        if values:
            assert struct.unpack(f"<HH{len(values)}Q", fields) == (1, 8 * len(values), *values)
        else:
            assert fields == b""


def _wide_values(record: archive.Record, limit: int) -> list[tuple[int, bool]]:
    large = record.size >= limit
    return [(record.size, large), (record.size, large), (record.header, record.header >= limit)]


@pytest.mark.parametrize("by_queue", [0, 1 << 40], ids=["queue", "in_a_row"])
def test_many_small_records_are_put_together_in_bounded_pieces(
    by_queue: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_GAP", 10_000)
    monkeypatch.setattr(stream, "BY_QUEUE", by_queue)
    expected = [torch.full((500,), float(i)) for i in range(100)]
    made = Archive.of(expected)
    assert max(len(gap) for _, gap in made.gaps()) < 14_000
    expected[60:60] = [torch.arange(20_000.0), torch.arange(30_000.0)]
    write_archive(tmp_path / "f.pt", Archive.of(expected))
    assert_same(torch.load(tmp_path / "f.pt", weights_only=True), expected)


def test_views_of_one_memory_as_two_types_are_refused_as_torch_does() -> None:
    memory = torch.zeros(4)
    pair = [memory, memory.view(torch.int32)]
    with pytest.raises(RuntimeError, match="different types"):
        torch.save(pair, io.BytesIO())
    with pytest.raises(RuntimeError, match="different types"):
        Archive.of(pair)


def test_mock_writes_nothing_and_statistics_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Archive.of(content())
    entry = write_archive(tmp_path / "f.pt", made, Settings(type="MOCK", show_statistics=True))
    assert entry.size == made.size and not list(tmp_path.iterdir())
    assert "MOCK" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_terminals_after_a_second_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("deepspeed.checkpoint.progress.time.monotonic", lambda: now[0])
    terminal, pipe = Terminal(), io.StringIO()
    for screen in (terminal, pipe):
        now[0] = 0.0
        bar = Progress(100, "save", screen)
        bar.add(20)
        assert screen.getvalue() == ""
        now[0] = 1.5
        bar.add(30)
        bar.close()
    assert " 50% " in terminal.getvalue() and terminal.getvalue().endswith("\n")
    assert pipe.getvalue() == ""
    quick = Terminal()
    Progress(1, "save", quick).close()
    assert quick.getvalue() == ""
