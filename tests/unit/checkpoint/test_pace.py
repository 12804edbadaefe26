# SPDX-License-Identifier: Apache-2.0
"""A save beside training goes at a rate for each core, and takes no longer than it may."""

from __future__ import annotations

import os
import threading
import time

import pytest

from deepspeed.checkpoint import pace
from deepspeed.checkpoint.pace import Pace, cores_of_rank


def seconds(action: object, *args: object) -> float:
    begun = time.monotonic()
    action(*args)  # type: ignore[operator]
    return time.monotonic() - begun


def test_rest_is_in_proportion_to_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "cores_of_rank", lambda: 2.0)
    monkeypatch.setattr(pace, "RATE", 1e6)
    made = Pace(1000)
    # 100 kB at 2 MB/s are 50 ms; the clock of a sleeping thread may be a little early
    assert seconds(made.rest, 100_000) > 0.045
    time.sleep(0.06)
    assert seconds(made.rest, 100_000) < 0.045  # the time has passed already


def test_no_save_takes_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "RATE", 1e-9)
    monkeypatch.setattr(pace, "LONGEST", 0.2)
    made = Pace(1000)
    passed = sum(seconds(made.rest, 100) for _ in range(10))
    assert 0.15 < passed < 2.0  # ten parts of 20 ms, on a busy machine


def test_lifting_ends_the_rest_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "RATE", 1e-9)
    made = Pace(1000)
    threading.Timer(0.05, made.lift).start()
    assert seconds(made.rest, 1000) < 30  # of two minutes
    assert made.is_lifted and seconds(made.rest, 1000) < 30


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no system call for it")
def test_ranks_divide_the_cores_that_they_are_not_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert cores_of_rank() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3})
    assert cores_of_rank() == 3
