# SPDX-License-Identifier: Apache-2.0
"""``ds_bench`` and ``ds_ssh`` as commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from deepspeed.comm import bench
from tests.helpers import nodes
from tests.helpers.launching import ROOT, environment


def run(script, *words, folder, **env):
    return subprocess.run(
        [sys.executable, ROOT / "bin" / script, *words],
        cwd=folder,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )


def test_ds_bench_starts_ranks_and_measures_every_collective(tmp_path):
    words = ["--scan", "--maxsize", "12", "--trials", "3", "--warmups", "1", "--json", "rows.json"]
    done = run("ds_bench", *words, "--bw-unit", "GBps", folder=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    head, titles, *table = [line for line in done.stdout.splitlines() if "WARNING" not in line]
    assert head == "2 ranks, gloo, torch.float32"
    assert titles.split() == ["op", "size", "time", "ms", "algbw", "GBps", "busbw", "GBps"]
    assert [line.split()[0] for line in table] == [op for op in bench.OPS for _ in range(3)]
    told = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert told["world_size"] == 2
    assert [row["size"] for row in told["rows"]] == [4096, 8192, 16384] * len(bench.OPS)
    shares = {"all_reduce": (2.0, 1.0), "broadcast": (1.0, 1.0), "pt2pt": (1.0, 1.0)}
    for row in told["rows"]:
        rate = row["size"] * 8 / (row["time_ms"] / 1e3) / 1e9
        # of two ranks each sends half of a gather, and all of a reduction's two passes by halves
        alg, bus = shares.get(row["op"], (1.0, 0.5))
        assert row["algbw"] == pytest.approx(alg * rate)
        assert row["busbw"] == pytest.approx(bus * rate)


@pytest.mark.parametrize("words", [["--dtype", "banana"], ["--maxsize", "99"]])
def test_ds_bench_refuses_what_cannot_be(tmp_path, words, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert bench.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("ds_bench: error: ")
    assert words[1] in error


@pytest.mark.parametrize(("ranks", "sizes"), [(2, [1024, 2048]), (3, [1023, 2046])])
def test_sizes_are_multiples_of_the_ranks(ranks, sizes):
    options = bench.build_parser().parse_args(["--scan", "--maxsize", "11"])
    assert list(bench.sizes(options, ranks)) == sizes
    assert list(bench.sizes(bench.build_parser().parse_args(["--maxsize", "1"]), 4)) == [4]


def test_ds_ssh_runs_a_command_on_every_host(tmp_path):
    (tmp_path / "sshd").mkdir()
    with nodes.serving(tmp_path / "sshd") as sshd:
        lines = [f"{host} slots=1\n" for host in nodes.HOSTS]
        (tmp_path / "hosts").write_text("".join(lines), encoding="utf-8")
        words = ["-f", "hosts", "--ssh_args", f"-F {sshd.config}"]
        done = run("ds_ssh", *words, "echo", "a   b | tr a c;", "exit 4", folder=tmp_path)
        assert done.returncode == 4
        told = [line for line in done.stdout.splitlines() if line.startswith("127.")]
        assert sorted(told) == ["127.0.0.1: c b", "127.0.0.2: c b"]
        assert "node 127.0.0.2 ended with status 4" in done.stdout
        one = run("ds_ssh", *words, "-e", nodes.HOSTS[0], "true", folder=tmp_path)
        assert (one.returncode, one.stdout) == (0, "")


def test_ds_ssh_without_a_hostfile_says_so(tmp_path):
    done = run("ds_ssh", "-f", "nowhere", "true", folder=tmp_path)
    assert done.returncode == 1
    assert "ds_ssh: error: there is no hostfile 'nowhere'" in done.stderr
