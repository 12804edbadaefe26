# SPDX-License-Identifier: Apache-2.0
"""Timers against a clock that the test moves."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from deepspeed.utils import timer
from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer, ThroughputTimer, trim_mean


@pytest.fixture
def clock(monkeypatch):
    hands = SimpleNamespace(now=100.0)
    monkeypatch.setattr(timer.time, "perf_counter", lambda: hands.now)
    return hands


def interval(stopwatch, clock, milliseconds, **options):
    stopwatch.start()
    clock.now += milliseconds / 1e3
    stopwatch.stop(**options)


def test_intervals_add_up_until_they_are_read(clock):
    watch = SynchronizedWallClockTimer()("fwd")
    interval(watch, clock, 5)
    interval(watch, clock, 7)
    assert watch.elapsed(reset=False) == pytest.approx(12)
    assert watch.elapsed() == pytest.approx(12)
    assert watch.elapsed() == 0
    assert watch.mean() == pytest.approx(6)


def test_a_running_timer_can_be_read(clock):
    watch = SynchronizedWallClockTimer()("fwd")
    watch.start()
    clock.now += 0.002
    assert watch.elapsed(reset=False) == pytest.approx(2)
    clock.now += 0.003
    assert watch.elapsed() == pytest.approx(5)
    watch.stop()


def test_stop_can_replace_what_was_there(clock):
    watch = SynchronizedWallClockTimer()("fwd")
    interval(watch, clock, 5)
    interval(watch, clock, 3, reset=True)
    assert watch.elapsed() == pytest.approx(3)


def test_starting_twice_or_stopping_what_does_not_run_asserts():
    watch = SynchronizedWallClockTimer()("fwd")
    with pytest.raises(AssertionError, match="not started"):
        watch.stop()
    watch.start()
    with pytest.raises(AssertionError, match="fwd timer has already been started"):
        watch.start()


def test_the_log_line_has_its_form(clock, capsys):
    timers = SynchronizedWallClockTimer()
    interval(timers("fwd"), clock, 10.086)
    interval(timers("bwd"), clock, 20)
    timers.log(["fwd", "unknown", "bwd"], normalizer=2)
    timers.log(["fwd"], memory_breakdown=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "[Rank -1] time (ms) | fwd: 5.04 | bwd: 10.00"
    assert re.fullmatch(r"\[Rank -1\] time \(ms\) \| fwd: 0.00 \| mem_allocated: .* GB.*", second)
    with pytest.raises(ValueError, match="normalizer"):
        timers.log(["fwd"], normalizer=0)


def test_means_are_by_name_and_reset(clock):
    timers = SynchronizedWallClockTimer()
    interval(timers("fwd"), clock, 4)
    interval(timers("fwd"), clock, 8)
    assert timers.get_mean(["fwd", "unknown"]) == {"fwd": pytest.approx(6)}
    assert timers.get_mean(["fwd"]) == {"fwd": 0.0}
    assert set(timers.get_timers()) == {"fwd"}
    assert timers.has_timer("fwd")


@pytest.mark.parametrize(
    ("data", "percent", "mean"), [([], 0.1, 0), ([1, 2, 3, 4, 100], 0.2, 3), ([1, 2], 0.1, 1.5)]
)
def test_trimmed_mean_leaves_the_ends_out(data, percent, mean):
    assert trim_mean(data, percent) == mean


def test_trimming_everything_is_refused():
    with pytest.raises(ValueError, match="trim_percent"):
        trim_mean([1.0], 0.5)


def test_the_noop_timer_has_every_method_and_does_nothing(capsys):
    timers = NoopTimer()
    watch = timers("anything")
    watch.start()
    watch.stop(reset=True, record=True)
    watch.reset()
    timers.log(["anything"])
    assert (watch.elapsed(reset=False), watch.mean()) == (0, 0)
    assert (timers.get_timers(), timers.get_mean(["x"]), timers.has_timer("x")) == ({}, {}, True)
    assert timers("one") is timers("two")
    assert capsys.readouterr().out == ""


CONFIG = SimpleNamespace(enabled=True, synchronized=True)


def run_steps(meter, clock, steps, micro=1, milliseconds=10.0):
    for _ in range(steps):
        for index in range(micro):
            meter.start()
            clock.now += milliseconds / 1e3
            meter.stop(global_step=index == micro - 1)


def test_throughput_leaves_out_the_first_steps_and_counts_samples(clock):
    lines = []
    meter = ThroughputTimer(CONFIG, 4, steps_per_output=2, logging_fn=lines.append)
    run_steps(meter, clock, 2, micro=2, milliseconds=500)
    assert meter.avg_samples_per_sec() == float("-inf")
    assert lines == []
    run_steps(meter, clock, 2, micro=2, milliseconds=10)
    assert meter.avg_samples_per_sec() == pytest.approx(4 / 0.020)
    (line,) = lines
    found = re.fullmatch(
        r"epoch=0/micro_step=8/global_step=4, RunningAvgSamplesPerSec=([\d.]+), "
        r"CurrSamplesPerSec=([\d.]+), MemAllocated=[\d.]+GB, MaxMemAllocated=[\d.]+GB",
        line,
    )
    assert float(found[1]) == pytest.approx(200)
    assert float(found[2]) == pytest.approx(200, rel=1e-3)  # a microsecond is added to the time


def test_the_epoch_starts_the_micro_steps_anew(clock):
    meter = ThroughputTimer(CONFIG, 4)
    run_steps(meter, clock, 3)
    meter.update_epoch_count()
    run_steps(meter, clock, 1)
    assert (meter.epoch_count, meter.micro_step_count, meter.global_step_count) == (1, 1, 4)


def test_reports_can_be_held_back_and_never_come_without_an_interval(clock):
    lines = []
    held = ThroughputTimer(CONFIG, 4, steps_per_output=1, logging_fn=lines.append)
    for _ in range(5):
        held.start()
        held.stop(global_step=True, report_speed=False)
    run_steps(ThroughputTimer(CONFIG, 4, logging_fn=lines.append), clock, 5)
    run_steps(
        ThroughputTimer(CONFIG, 4, steps_per_output=float("inf"), logging_fn=lines.append), clock, 5
    )
    assert lines == []


def test_host_memory_can_be_added(clock):
    lines = []
    meter = ThroughputTimer(
        CONFIG, 4, steps_per_output=3, monitor_memory=True, logging_fn=lines.append
    )
    run_steps(meter, clock, 3)
    assert re.fullmatch(r"epoch=0/micro_step=3/global_step=3, vm %: .*, swap %: .*", lines[1])


def test_a_disabled_meter_counts_nothing(clock):
    meter = ThroughputTimer(SimpleNamespace(enabled=False, synchronized=True), 4)
    run_steps(meter, clock, 5)
    assert (meter.micro_step_count, meter.global_step_count) == (0, 0)
