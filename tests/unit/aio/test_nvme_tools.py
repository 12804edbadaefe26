# SPDX-License-Identifier: Apache-2.0
"""ds_io and ds_nvme_tune: their tables, chart and JSON, their refusals, and that no file is left."""

from __future__ import annotations

import json
import struct
import zlib

import pytest

from deepspeed.nvme import ds_io_main, ds_nvme_tune_main
from deepspeed.nvme.measure import size_of
from deepspeed.nvme.plot import bar_chart


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--read", "--validate", "--io_parallel", "2"],
        ["--engine", "aio_basic", "--single_submit", "--include_warmup_time"],
        ["--engine", "torch_io", "--read"],
        ["--engine", "torch_io", "--torch_legacy_save", "--different_file_each_iteration"],
    ],
)
def test_ds_io_prints_a_table_and_leaves_nothing(folder, capsys, extra):
    assert ds_io_main(["--folder", str(folder), "--io_size", "64K", "--loops", "2", *extra]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["warmup", "0", "1", "mean"]
    assert list(folder.iterdir()) == []


def test_ds_io_by_two_processes(folder, capsys):
    places = [f"{folder / name}:0" for name in "ab"]
    words = ["--folder_to_device_mapping", *places, "--io_size", "64K", "--loops", "1"]
    assert ds_io_main(words) == 0
    assert "x 2 process(es)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--io_size", "1K"], "--folder"),
        (["--folder", ".", "--io_size", "0"], "not a size"),
        (["--folder", ".", "--io_size", "1K", "--use_gds"], "GPUDirect"),
        (["--folder", ".", "--io_size", "1K", "--block_size", "1"], "block_size"),
        (["--folder", ".", "--io_size", "1K", "--multi_process", "0"], "positive"),
    ],
)
def test_ds_io_refuses_with_one_line(capsys, words, said):
    assert ds_io_main(words) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_ds_nvme_tune_ends_with_the_section(folder, capsys):
    sweep = folder / "sweep.json"
    sweep.write_text(
        json.dumps({"block_size": ["4K", "64K"], "queue_depth": [4], "io_parallel": [1]}),
        encoding="utf-8",
    )
    disk, logs = folder / "disk", folder / "logs"
    words = ["--nvme_dir", str(disk), "--io_size", "256K", "--sweep_config", str(sweep)]
    assert ds_nvme_tune_main([*words, "--log_dir", str(logs)]) == 0
    out = capsys.readouterr().out
    best = json.loads(out[out.index("{") :])["aio"]
    assert best["block_size"] in (4096, 65536) and best["queue_depth"] == 4
    assert set(best) == {
        "block_size",
        "queue_depth",
        "overlap_events",
        "single_submit",
        "intra_op_parallelism",
    }
    rows = json.loads((logs / "results.json").read_text(encoding="utf-8"))
    assert len(rows) == 4 and all(row["read"] > 0 and row["write"] > 0 for row in rows)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("sweep", ["[]", '{"color": ["red"]}', "{", '{"block_size": ["x"]}'])
def test_ds_nvme_tune_refuses_a_bad_sweep(folder, capsys, sweep):
    path = folder / "sweep.json"
    path.write_text(sweep, encoding="utf-8")
    words = ["--nvme_dir", str(folder), "--sweep_config", str(path), "--log_dir", str(folder)]
    assert ds_nvme_tune_main(words) == 1
    assert capsys.readouterr().err.startswith("ds_nvme_tune: ")


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("4k", 4096), ("1M", 1 << 20), ("2GB", 2 << 30)]
)
def test_sizes(text, size):
    assert size_of(text) == size


def test_the_chart_is_a_png_with_bars_of_the_right_height(folder):
    path = folder / "chart.png"
    bar_chart(path, [[1.0, 0.5], [0.25, 0.0]])
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    at = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    rows = zlib.decompress(data[at + 4 : at + 4 + length])
    assert len(rows) == height * (3 * width + 1)
    bars = [rows.count(bytes(color) * 11) for color in ((70, 120, 190), (225, 140, 60))]
    assert bars == [300 + 75, 150]
