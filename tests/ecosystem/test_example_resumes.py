# SPDX-License-Identifier: Apache-2.0
"""An example program that is killed in the middle of a save goes on from the save before.

Runs where DS_EXAMPLES names a copy of DeepSpeedExamples and DS_EXAMPLES_HF_HOME the Hugging Face home with the tokenizer
and the texts that training/HelloDeepSpeed reads.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed.checkpoint.reader import Folder, read_tag
from tests.helpers.launching import environment, free_port

EXAMPLES, HOME = os.environ.get("DS_EXAMPLES"), os.environ.get("DS_EXAMPLES_HF_HOME")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (EXAMPLES and HOME), reason="DS_EXAMPLES and DS_EXAMPLES_HF_HOME"),
]

# Runs a program; kills the process at its `at`-th file made for a checkpoint, half of it written.
PROGRAM = """
import os, runpy, signal, sys
from deepspeed.checkpoint import atomic

class Deadly(atomic.Disk):
    left = int(sys.argv[1])

    def create(self, path):
        file = super().create(path)
        if path.name.endswith("_states.pt"):
            Deadly.left -= 1
        if Deadly.left == 0:
            file.write(b"half a file")
            print("dying in", path, flush=True)
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        return file

atomic.disk = Deadly()
sys.argv = sys.argv[2:]
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STEPS = ["--num_iterations", "6", "--log_every", "1"]
NEVER, SECOND_SAVE = "1000", "4"  # each save makes a file of the model and one of the optimizer


def run(folder: Path, die_at: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = environment(
        HF_HUB_OFFLINE="1",
        HF_HOME=str(HOME),
        TOKENIZERS_PARALLELISM="false",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, die_at, "train_bert_ds.py", *arguments, *STEPS],
        cwd=folder,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )


def test_bert_goes_on_after_a_kill_in_mid_save(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(Path(str(EXAMPLES)) / "training" / "HelloDeepSpeed", folder)
    small = ["--batch_size", "1", "--checkpoint_every", "2"]
    killed = run(folder, SECOND_SAVE, "--checkpoint_dir", "runs", *small)
    assert killed.returncode != 0 and "dying in" in killed.stdout, killed.stderr[-3000:]
    (experiment,) = (folder / "runs").iterdir()
    before = read_tag(experiment, "latest")
    assert before is not None and (experiment / before / "manifest.json").is_file()
    assert list(experiment.glob("*.tmp"))
    again = run(folder, NEVER, "--load_checkpoint_dir", str(experiment))
    assert again.returncode == 0, again.stderr[-3000:]
    after = read_tag(experiment, "latest")
    steps = [int(re.sub(r"\D", "", tag)) for tag in (before, str(after))]
    assert steps[1] > steps[0] > 0
    assert not list(experiment.glob("*.tmp"))
    saved = Folder(experiment / str(after))
    for name in saved.glob("*.pt"):
        saved.load(name)
