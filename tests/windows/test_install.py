# SPDX-License-Identifier: Apache-2.0
"""The installed package under Windows: its import, its native library, its report, and the unit tests."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

from tests.contract.test_import_budget import HEAVY, PROBE, SECONDS
from tests.windows import winpy


def test_the_native_library_is_used(windows):
    code = "from deepspeed.ops import native; print(native.status())"
    done = windows.python("-c", code)
    assert done.returncode == 0, done.stdout
    assert "route='native'" in done.stdout, done.stdout


def test_import_keeps_its_budget(windows):
    records = []
    for _ in range(2):
        done = windows.python("-c", PROBE.format(path=".", what=""), cwd=windows.programs)
        assert done.returncode == 0, done.stdout
        records.append(json.loads(done.stdout))  # fails on any other output
    record = min(records, key=lambda one: one["seconds"])
    assert record["seconds"] <= SECONDS
    assert record["processes"] == [] and not record["cuda"] and not record["distributed"]
    assert [name for name in record["loaded"] if name in HEAVY] == []


def test_version_is_found_by_its_distribution_name(windows):
    code = "import deepspeed, importlib.metadata as m; print(m.version('deepspeed'), deepspeed.__version__)"
    done = windows.python("-c", code)
    assert done.stdout.split() == ["0.20.0", "0.20.0"], done.stdout


def test_ds_report_prints_a_table_and_json(windows, folder):
    table = windows.run("ds_report", cwd=folder)
    assert table.returncode == 0, table.stdout
    assert "deepspeed" in table.stdout and "torch" in table.stdout
    record = windows.run("ds_report", "--json", cwd=folder)
    assert record.returncode == 0, record.stdout
    assert isinstance(json.loads(record.stdout), dict)


def shares(number: int) -> list[list[str]]:
    """The unit tests' files in `number` lists of about as many bytes: dealt in turns, the largest first."""
    files = (winpy.ROOT / "tests" / "unit").rglob("test_*.py")
    by_size = sorted(files, key=lambda file: file.stat().st_size, reverse=True)
    names = [file.relative_to(winpy.ROOT).as_posix() for file in by_size]
    return [names[first::number] for first in range(number)]


def test_unit_tests_pass(windows, tmp_path):
    with_tests = windows.with_paths(winpy.ROOT)

    def outcome(number: int, files: list[str]) -> tuple[int, str]:
        folder = tmp_path / str(number)
        folder.mkdir()
        # the installed package, not the tree's: pytest's own path entry would put the tree first
        options = (f"cache_dir={winpy.windows_path(folder)}", "pythonpath=")
        options += ("faulthandler_timeout=180", "faulthandler_exit_on_timeout=true")
        words = ["-m", "pytest", "-q", "--maxfail=20"]
        words += [word for option in options for word in ("-o", option)]
        done = with_tests.python(*words, *files, timeout=1700)
        if done.returncode != 0 and re.search(r"\b\d+ failed, [1-9]\d* passed", done.stdout):
            print(done.stdout[-6000:])
            # Wine's file locks and timers are not Windows': what failed once must pass by itself
            done = with_tests.python(*words, *files, "--last-failed", timeout=600)
        return done.returncode, done.stdout[-6000:]

    with ThreadPoolExecutor(2) as pool:  # as many interpreters as the smallest runner has cores
        for code, text in pool.map(outcome, (0, 1), shares(2)):
            print(text)
            assert code == 0, text
            assert re.search(r"\b[1-9]\d* passed", text)
