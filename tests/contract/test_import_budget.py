# SPDX-License-Identifier: Apache-2.0
"""What `import deepspeed` may cost: 0.3 s over torch, no output, no process, no CUDA, no failure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 0.3
HEAVY = ("pydantic", "transformers", "hjson", "numpy.testing", "tqdm", "psutil", "cpuinfo")

# runs in a fresh interpreter; the last line it prints is the record, anything before it is a finding
PROBE = """
import json, sys, time
sys.path.insert(0, {path!r})
import torch
processes = []
STARTS = ("subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system")
def watch(event, args):
    if event.startswith(STARTS):
        processes.append(event)
sys.addaudithook(watch)
before = set(sys.modules)
start = time.perf_counter()
import deepspeed{what}
seconds = time.perf_counter() - start
print(json.dumps(dict(
    seconds=seconds,
    processes=processes,
    cuda=torch.cuda.is_initialized(),
    distributed=torch.distributed.is_available() and torch.distributed.is_initialized(),
    chosen=getattr(sys.modules.get("deepspeed.accelerator.real_accelerator"), "_current", None) is not None,
    loaded=sorted(set(sys.modules) - before),
    file=deepspeed.__file__,
)))
"""


def probe(path: Path = ROOT, what: str = "") -> dict:
    """The record of one import in a fresh interpreter; fails on any other output or exit code."""
    code = PROBE.format(path=str(path), what=what)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:deepspeed", "-c", code],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    record = json.loads(lines[-1])
    record["printed"] = "\n".join([*lines[:-1], done.stderr.strip()]).strip()
    return record


@pytest.fixture(scope="module")
def record() -> dict:
    return min((probe() for _ in range(3)), key=lambda one: one["seconds"])


def test_import_adds_little_time_to_torch(record):
    assert record["seconds"] <= SECONDS


def test_import_prints_nothing(record):
    assert record["printed"] == ""


def test_import_starts_no_process(record):
    assert record["processes"] == []


def test_import_touches_no_device_and_no_group(record):
    assert not record["cuda"] and not record["distributed"]


def test_import_loads_nothing_heavy(record):
    assert [name for name in record["loaded"] if name in HEAVY] == []


def test_import_is_lazy(record):
    # the door, its version and what the door itself needs; not the engine, the ops or the config
    ours = [name for name in record["loaded"] if name.startswith("deepspeed.")]
    assert not [
        n for n in ours if n.startswith(("deepspeed.runtime.", "deepspeed.ops.", "deepspeed.moe"))
    ]


@pytest.mark.parametrize("what", [".runtime.zero.layout", ".runtime.lr_schedules", ".comm.mesh"])
def test_importing_a_leaf_does_not_import_its_siblings(what):
    loaded = {name for name in probe(what=what)["loaded"] if name.startswith("deepspeed")}
    assert "deepspeed.runtime.engine" not in loaded
    assert "pydantic" not in loaded
    assert len(loaded) <= 12, sorted(loaded)


def test_importing_the_engine_does_not_choose_the_accelerator():
    assert not probe(what=".runtime.engine")["chosen"]


def copy_of_the_package(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dll", "*.dylib")
    shutil.copytree(ROOT / "deepspeed", folder / "deepspeed", ignore=ignored)
    return folder / "deepspeed"


def test_import_works_without_the_native_library(tmp_path):
    package = copy_of_the_package(tmp_path)
    assert Path(probe(tmp_path)["file"]).parent == package


def test_import_works_with_a_broken_native_library(tmp_path):
    package = copy_of_the_package(tmp_path)
    library = package / "ops" / "lib"
    library.mkdir(exist_ok=True)
    found = list((ROOT / "deepspeed" / "ops" / "lib").glob("*"))
    for name in {path.name for path in found} | {"libdeepspeed_cpu.so", "deepspeed_cpu.dll"}:
        (library / name).write_bytes(b"this is no library")
    assert Path(probe(tmp_path)["file"]).parent == package
