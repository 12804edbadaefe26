# SPDX-License-Identifier: Apache-2.0
"""What a training step holds in memory is what the memory plan says, through benchmarks/zero_memory.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import free_port

ROOT = Path(__file__).resolve().parents[2]
# Interpreter and libraries breathe by some MB; that is part of 10 % of the small models here, none of large ones.
SLACK = 16 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("ranks", "cells"),
    [(1, "stage2,stage3-super,stage3-small,stage3-nvme"), (2, "stage1,stage2,stage3-small")],
)
def test_resident_bytes_are_the_plans(ranks, cells, tmp_path):
    out = tmp_path / "rows.json"
    script = str(ROOT / "benchmarks" / "zero_memory.py")
    words = ["--params", "32M", "--cells", cells, "--ranks", str(ranks), "--json", str(out)]
    words += ["--folder", str(tmp_path), "--port", str(free_port())]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # The C library keeps freed blocks below this size for later; what it hoards is not what the step needs.
    env = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    subprocess.run([sys.executable, script, *words], env=env, check=True, timeout=150)
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert len(rows) == cells.count(",") + 1
    for name, row in rows.items():
        for kind in ("peak", "lasting"):
            got, want = row[kind], row[f"planned {kind}"]
            assert abs(got - want) < 0.1 * want + SLACK, f"{kind} of {name}: {got} for {want}"
    if (
        ranks == 1
    ):  # all but the buffers is in files: two bytes of parameters, twelve of states, two of gradients
        assert rows["stage3-nvme, 1 rank"]["lasting"] < 0.4 * 16 * row["params"]
