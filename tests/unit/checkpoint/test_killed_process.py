# SPDX-License-Identifier: Apache-2.0
"""A real process, killed without warning in the middle of a save, resumes from what it saved before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpointing import engine, same, state_of, train
from tests.helpers.launching import environment

PROGRAM = """
import os, signal, sys, torch
from deepspeed.checkpoint import atomic
from tests.helpers.checkpointing import engine, state_of, train

operation, at = sys.argv[1], int(sys.argv[2])

class Deadly(atomic.Disk):
    armed, count = False, 0

def guard(name):
    real = getattr(atomic.Disk, name)
    def method(self, *arguments):
        if self.armed:
            if self.count == at:
                if name == "write":
                    arguments[0].write(bytes(arguments[1])[:len(arguments[1]) // 2])
                print("dying", flush=True)
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
            self.count += 1
        return real(self, *arguments)
    return method

setattr(Deadly, operation, guard(operation))
atomic.disk = Deadly()
made = engine(2, "bf16")
train(made, 0, 2)
torch.save(state_of(made), "state2.pt")
made.save_checkpoint('checkpoints')
train(made, 2, 4)
torch.save(state_of(made), "state4.pt")
Deadly.armed = True
made.save_checkpoint('checkpoints', tag=sys.argv[3])
"""


@pytest.mark.parametrize(
    ("operation", "at", "tag", "survives"),
    [
        ("create", 1, "new", 2),
        ("write", 2, "new", 2),
        ("sync", 2, "new", 2),
        ("replace", 0, "new", 2),
        ("replace", 1, "new", 2),
        ("replace", 1, "global_step2", 2),  # the tag itself is being replaced
        ("replace", 2, "global_step2", 4),
        ("remove_tree", 0, "global_step2", 4),
    ],
)
def test_a_killed_save_costs_nothing(
    operation: str, at: int, tag: str, survives: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PROGRAM, operation, str(at), tag]
    done = subprocess.run(
        command,
        env=environment(KMP_AFFINITY="disabled"),
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    # files are flushed side by side: two threads may come to this point before the signal does
    assert done.stdout.rstrip().endswith("dying"), done.stdout + done.stderr
    if os.name != "nt":
        assert done.returncode == -signal.SIGKILL
    made = engine(2, "bf16", seed=9)
    made.load_checkpoint(tmp_path / "checkpoints")
    assert made.global_steps == survives
    expected = torch.load(tmp_path / f"state{survives}.pt", weights_only=True)
    assert same(state_of(made), expected) == []
    train(made, survives, survives + 1)
    made.save_checkpoint(tmp_path / "checkpoints")
    folders = (tmp_path / "checkpoints").iterdir()
    assert not [p.name for p in folders if p.is_dir() and p.suffix in (".tmp", ".old")]
