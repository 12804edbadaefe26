# SPDX-License-Identifier: Apache-2.0
"""A save that dies or fails at any change it makes to the disk loses nothing, on one rank and on two; nothing hangs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint import archive, atomic, joint, stream
from tests.helpers.checkpointing import engine, same, state_of, train
from tests.helpers.deaths import CHANGES, SECTIONS, send_everything
from tests.helpers.launching import environment


@pytest.mark.skipif(
    os.name == "nt", reason="no fork; unit/checkpoint/test_killed_process.py kills there"
)
@pytest.mark.parametrize(
    ("cases", "least"),
    [
        (["1-now-same", "1-queue-new", "1-beside-new"], [[28], [40], [20]]),
        (["2-joint-same", "2-beside-new"], [[40, 9], [20, 5]]),
    ],
    ids=["one_rank", "two_ranks"],
)
def test_killed_at_every_change_the_last_complete_state_is_loaded(
    cases: list[str], least: list[list[int]], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.deaths", str(tmp_path), *cases],
        env=environment(KMP_AFFINITY="disabled", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"),
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for case, points in zip(cases, least, strict=True):
        assert found[case]["wrong"] == [], done.stdout + done.stderr
        # so many there are, or the watch has become blind
        assert all(n >= m for n, m in zip(found[case]["points"], points, strict=True)), found


class Failing(atomic.Disk):
    """Raises at change number `at`, in the middle of it where it is one of bytes."""

    def __init__(self, at: int, code: int) -> None:
        self.at, self.code, self.count = at, code, 0
        self._lock = threading.Lock()  # files are flushed side by side

    def meet(self, name: str, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            self.count += 1
            met = self.count - 1 == self.at
        if met:
            if name == "write":
                arguments[0].write(bytes(arguments[1])[: len(arguments[1]) // 2])
            raise OSError(self.code, "injected")


def _guard(name: str) -> Any:
    def method(self: Failing, *arguments: Any) -> Any:
        self.meet(name, arguments)
        return getattr(atomic.Disk, name)(self, *arguments)

    return method


for _name in CHANGES:
    setattr(Failing, _name, _guard(_name))


def fail_everywhere(rank: int, ranks: int, root: Path, mode: str) -> dict[str, Any]:
    """Save with an error at each change of each rank; returns how many changes there are and what went wrong."""
    before = stream.BY_QUEUE, archive.LARGE, joint._PAGE
    send_everything(mode)
    made = engine(2, "bf16", checkpoint=SECTIONS.get(mode))
    train(made, 0, 2, rank, ranks)
    states = {2: state_of(made)}
    try:
        _save(made, root / "template", "old", atomic.Disk())
        train(made, 2, 4, rank, ranks)
        states[4] = state_of(made)
        if rank == 0:
            shutil.copytree(root / "template", root / "counted")
        _gather(ranks, None)
        counts = _gather(ranks, _save(made, root / "counted", "new", Failing(-1, 0))[1])
        wrong = []
        for bad, count in enumerate(counts):
            for at in range(count):
                code = (errno.ENOSPC, errno.EIO)[at % 2]
                folder = root / f"rank{bad}_at{at}"
                if rank == 0:
                    shutil.copytree(root / "template", folder)
                _gather(ranks, None)
                disk = Failing(at if rank == bad else -1, code)
                raised, _ = _save(made, folder, "new", disk)
                if raised is None or (rank == bad) != (raised.args[0] == code):
                    wrong.append(f"{bad} {at}: {raised!r}")
                wrong += [f"{bad} {at}: {text}" for text in _look(folder, states)]
    finally:
        stream.BY_QUEUE, archive.LARGE, joint._PAGE = before
    return {"counts": counts, "wrong": wrong}


def _save(made: Any, folder: Path, tag: str, disk: atomic.Disk) -> tuple[Exception | None, int]:
    before, atomic.disk = atomic.disk, disk
    try:
        made.save_checkpoint(folder, tag=tag)
        made.checkpoint_engine.finish()
    except Exception as error:
        return error, getattr(disk, "count", 0)
    finally:
        atomic.disk = before
    return None, getattr(disk, "count", 0)


def _gather(ranks: int, item: Any) -> list[Any]:
    told: list[Any] = [item]
    if ranks > 1:
        told = [None] * ranks
        torch.distributed.all_gather_object(told, item)
    return told


def _look(folder: Path, states: dict[int, Any]) -> list[str]:
    fresh = engine(2, "bf16", seed=9)
    fresh.load_checkpoint(folder)
    state = state_of(fresh)
    left = {p.name for p in folder.iterdir() if p.is_dir()} - {"old", "new"}
    return same(state, states[fresh.global_steps]) + sorted(left - {"old.tmp", "new.tmp"})


@pytest.mark.parametrize("mode", ["joint", "beside"])
def test_an_error_at_any_change_on_any_rank_is_raised_on_all_and_costs_nothing(
    mode: str, ranks2: Any, tmp_path: Path
) -> None:
    found = ranks2.run(fail_everywhere, 2, tmp_path, mode, timeout=300)
    for result in found:
        assert result["wrong"] == []
        assert result["counts"][0] > 20 and result["counts"][1] >= 3
