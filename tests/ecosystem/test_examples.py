# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ for other libraries: each trains with our engine, and the loss falls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# script -> modules that it needs, beside torch; their own imports may be broken
NEEDS = {
    "trainer.py": ["transformers.trainer", "accelerate"],
    "accelerate_loop.py": ["accelerate"],
    "peft_lora.py": ["transformers.modeling_utils", "peft"],
    "trl_sft.py": ["transformers.trainer", "datasets", "trl"],
    "trl_dpo.py": ["transformers.trainer", "datasets", "trl"],
    "lightning_fit.py": ["lightning"],
}


def test_every_script_is_known_here():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(NEEDS)


@pytest.mark.parametrize(
    ("script", "stage"),
    [*((script, 2) for script in NEEDS), *((script, 3) for script in NEEDS if "fit" in script)]
    + [("trainer.py", 3), ("trl_sft.py", 3)],
)
def test_a_script_trains_with_our_engine(script, stage, tmp_path):
    for module in NEEDS[script]:
        pytest.importorskip(module, exc_type=ImportError)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), "--stage", str(stage), "--out", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"DeepSpeedEngine, stage {stage}\n" in done.stdout
    first, last = map(float, re.search(r"^loss (\S+) -> (\S+)$", done.stdout, re.M).groups())
    assert last < 0.95 * first
