# SPDX-License-Identifier: Apache-2.0
"""What an engine prints about its time and memory when it is asked to, and that a failed forward pass harms no timer."""

from __future__ import annotations

import logging
import re

import pytest
import torch

import deepspeed
from deepspeed.utils.logging import logger


def engine(**section):
    config = {"train_batch_size": 2, "optimizer": {"type": "Adam"}, **section}
    return deepspeed.initialize(model=torch.nn.Linear(4, 1), config=config)[0]


def step(run):
    run.backward(run(torch.ones(2, 4)).mean())
    run.step()


def test_times_of_each_micro_step_are_printed(capsys):
    run = engine(wall_clock_breakdown=True, steps_per_print=1)
    for _ in range(2):
        step(run)
    out = capsys.readouterr().out
    micro = (
        r"time \(ms\) \| fwd_microstep: [\d.]+ \| bwd_microstep: [\d.]+ \| step_microstep: [\d.]+"
    )
    assert len(re.findall(micro, out)) == 2
    assert len(re.findall(r"time \(ms\) \| fwd: [\d.]+ \| bwd: [\d.]+ \| step: [\d.]+", out)) == 2


def test_timers_run_again_after_a_forward_pass_that_raises():
    run = engine(wall_clock_breakdown=True)
    with pytest.raises(RuntimeError):
        run(torch.ones(2, 3))
    step(run)
    assert run.global_steps == 1


def test_memory_is_printed_around_every_event(capsys):
    step(engine(memory_breakdown=True))
    out = capsys.readouterr().out
    for event in ("forward", "backward", "step"):
        assert f"before {event}" in out
        assert f"after {event}" in out
    assert re.search(r"MA [\d.]+ GB .* Max_CA \d+ GB", out)


def test_an_engine_says_which_version_it_is(capsys, monkeypatch):
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    engine()
    assert f"DeepSpeed info: version={deepspeed.__version__}, git-hash=" in capsys.readouterr().out
