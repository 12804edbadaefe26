# SPDX-License-Identifier: Apache-2.0
"""Wall-clock timers: device events where CUDA runs, the host's clock elsewhere, nothing when off."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from .logging import logger, print_dist

FORWARD_MICRO_TIMER = "fwd_microstep"
FORWARD_GLOBAL_TIMER = "fwd"
BACKWARD_MICRO_TIMER = "bwd_microstep"
BACKWARD_GLOBAL_TIMER = "bwd"
BACKWARD_INNER_MICRO_TIMER = "bwd_inner_microstep"
BACKWARD_INNER_GLOBAL_TIMER = "bwd_inner"
BACKWARD_REDUCE_MICRO_TIMER = "bwd_allreduce_microstep"
BACKWARD_REDUCE_GLOBAL_TIMER = "bwd_allreduce"
STEP_MICRO_TIMER = "step_microstep"
STEP_GLOBAL_TIMER = "step"
TIME_EPSILON = 1e-6

_GB = 1024**3


def _on_device() -> bool:
    """Say whether CUDA is in use by this process: then work ends later than its call."""
    return torch.cuda.is_initialized()


def _synchronize() -> None:
    if _on_device():
        torch.cuda.synchronize()


def trim_mean(data: Sequence[float], trim_percent: float) -> float:
    """Return the mean without the given share of values at either end.

    Raises:
        ValueError: ``trim_percent`` is not within [0, 0.5).
    """
    if not 0.0 <= trim_percent < 0.5:
        raise ValueError(f"trim_percent: got {trim_percent}, expected 0 <= it < 0.5")
    if not data:
        return 0.0
    cut = int(trim_percent * len(data))
    kept = sorted(data)[cut : len(data) - cut]
    return sum(kept) / len(kept)


class StopWatch:
    """One named stop watch. Times are milliseconds."""

    def __init__(self, name: str) -> None:
        self.name_ = name
        self.started_ = False
        self._start: Any = None
        self._events: list[tuple[Any, Any]] = []  # finished intervals, not read yet
        self._intervals: list[float] = []
        self._history: list[float] = []

    def start(self) -> None:
        """Begin an interval.

        Raises:
            AssertionError: it is running already.
        """
        if self.started_:
            raise AssertionError(f"{self.name_} timer has already been started")
        if _on_device():
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()
        self.started_ = True

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """End the interval; it is added to the elapsed time, or replaces it with ``reset``.

        Args:
            reset: forget the earlier intervals.
            record: accepted for compatibility: every interval counts in `mean`.

        Raises:
            AssertionError: it is not running.
        """
        if not self.started_:
            raise AssertionError("timer is not started")
        if reset:
            self._intervals, self._events = [], []
        if isinstance(self._start, float):
            self._intervals.append((time.perf_counter() - self._start) * 1e3)
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._start, end))
        self._start = None
        self.started_ = False

    def _collect(self) -> None:
        for start, end in self._events:
            end.synchronize()
            self._intervals.append(start.elapsed_time(end))
        self._events = []

    def reset(self) -> None:
        """Forget everything."""
        self.started_ = False
        self._start = None
        self._events, self._intervals, self._history = [], [], []

    def elapsed(self, reset: bool = True) -> float:
        """Return the milliseconds of all intervals since the last reset, the running one included.

        Args:
            reset: begin again at zero (a running timer keeps running).
        """
        running = self.started_
        if running:
            self.stop()
        self._collect()
        total = sum(self._intervals)
        if reset:
            self._history += self._intervals
            self._intervals = []
        if running:
            self.start()
        return total

    def mean(self) -> float:
        """Return the mean interval since `reset`, without the tenth at either end."""
        self._collect()
        return trim_mean(self._history + self._intervals, 0.1)


class SynchronizedWallClockTimer:
    """A set of timers by name: ``timers("fwd").start()``."""

    Timer = StopWatch

    def __init__(self) -> None:
        self.timers: dict[str, StopWatch] = {}

    def get_timers(self) -> dict[str, StopWatch]:
        """Return the timers by name."""
        return self.timers

    def has_timer(self, name: str) -> bool:
        """Say whether a timer of this name exists."""
        return name in self.timers

    def __call__(self, name: str) -> StopWatch:
        if name not in self.timers:
            self.timers[name] = StopWatch(name)
        return self.timers[name]

    @staticmethod
    def memory_usage() -> str:
        """Return the memory in use, its peak and the allocator's share, as one line."""
        used, peak = _memory_gb()
        held = torch.cuda.memory_reserved() / _GB if _on_device() else used
        return f" | mem_allocated: {used:.4f} GB | max_mem_allocated: {peak:.4f} GB | cache_allocated: {held:.4f} GB"

    def log(
        self,
        names: Sequence[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Print ``time (ms) | name: 1.23 | ...`` for those of the timers that exist.

        Args:
            names: timers to print.
            normalizer: divide the times by this.
            reset: begin again at zero.
            memory_breakdown: add the memory in use.
            ranks: who prints; None is rank 0.

        Raises:
            ValueError: ``normalizer`` is not positive.
        """
        if normalizer <= 0.0:
            raise ValueError(f"normalizer: got {normalizer}, expected a positive number")
        parts = [
            f" | {name}: {self.timers[name].elapsed(reset=reset) / normalizer:.2f}"
            for name in names
            if name in self.timers
        ]
        line = "time (ms)" + "".join(parts)
        if memory_breakdown:
            line += self.memory_usage()
        print_dist(line, ranks=ranks or [0])

    def get_mean(
        self, names: Sequence[str], normalizer: float = 1.0, reset: bool = True
    ) -> dict[str, float]:
        """Return the mean interval of those of the timers that exist, in milliseconds."""
        if normalizer <= 0.0:
            raise ValueError(f"normalizer: got {normalizer}, expected a positive number")
        means = {}
        for name in names:
            if name in self.timers:
                means[name] = self.timers[name].mean() / normalizer
                if reset:
                    self.timers[name].reset()
        return means


class NoopTimer:
    """Has the methods of `SynchronizedWallClockTimer` and does nothing."""

    class Timer:
        """One timer that does nothing."""

        def start(self) -> None:
            """Do nothing."""

        def stop(self, **kwargs: Any) -> None:
            """Do nothing."""

        def reset(self) -> None:
            """Do nothing."""

        def elapsed(self, **kwargs: Any) -> float:
            """Return 0."""
            return 0.0

        def mean(self) -> float:
            """Return 0."""
            return 0.0

    def __init__(self) -> None:
        self.timer = self.Timer()

    def __call__(self, name: str) -> NoopTimer.Timer:
        return self.timer

    def has_timer(self, name: str) -> bool:
        """Say True: every timer is the one that does nothing."""
        return True

    def get_timers(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def log(
        self,
        names: Sequence[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Do nothing."""

    def get_mean(
        self, names: Sequence[str], normalizer: float = 1.0, reset: bool = True
    ) -> dict[str, float]:
        """Return nothing."""
        return {}


_peak_rss = 0


def _memory_gb() -> tuple[float, float]:
    """Return the memory in use and its peak, in GiB: the device's, or the process's on a CPU."""
    if _on_device():
        return torch.cuda.memory_allocated() / _GB, torch.cuda.max_memory_allocated() / _GB
    global _peak_rss
    used = psutil.Process().memory_info().rss
    _peak_rss = max(_peak_rss, used)
    return used / _GB, _peak_rss / _GB


def _swap_percent() -> float:
    try:
        return float(psutil.swap_memory().percent)
    except (OSError, RuntimeError):  # Windows with its performance counters switched off
        return float("nan")


class ThroughputTimer:
    """Counts samples per second over steps and logs them now and then.

    Args:
        config: has ``enabled`` and ``synchronized``.
        batch_size: samples of one step, over all ranks.
        start_step: steps that do not count: they warm up.
        steps_per_output: log every so many steps; None never does.
        monitor_memory: log the host's memory too.
        logging_fn: where lines go; None is the logger's info.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int,
        start_step: int = 2,
        steps_per_output: float | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], object] | None = None,
    ) -> None:
        self.config = config
        self.batch_size = max(1, batch_size or 1)
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.monitor_memory = monitor_memory
        self.logging = logging_fn or logger.info
        self.initialized = self.started = False
        self.start_time = self.end_time = 0.0
        self.epoch_count = 0
        self.micro_step_count = 0
        self.global_step_count = 0
        self.total_elapsed_time = 0.0
        self.step_elapsed_time = 0.0

    def update_epoch_count(self) -> None:
        """Note that an epoch ended: micro steps are counted anew."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self) -> None:
        """Begin a micro step."""
        if not self.config.enabled:
            return
        self.initialized = self.started = True
        if self.global_step_count >= self.start_step:
            if self.config.synchronized:
                _synchronize()
            self.start_time = time.perf_counter()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """End a micro step.

        Args:
            global_step: the optimizer stepped: a step is complete.
            report_speed: log now, if a line is due.
        """
        if not self.config.enabled or not self.started:
            return
        self.started = False
        self.micro_step_count += 1
        self.global_step_count += bool(global_step)
        if not self.start_time:
            return
        if self.config.synchronized:
            _synchronize()
        self.end_time = time.perf_counter()
        duration = self.end_time - self.start_time
        self.total_elapsed_time += duration
        self.step_elapsed_time += duration
        if global_step:
            if report_speed and self._due():
                self._report()
            self.step_elapsed_time = 0.0

    def _due(self) -> bool:
        every = self.steps_per_output
        return every is not None and every > 0 and self.global_step_count % every == 0

    def _report(self) -> None:
        used, peak = _memory_gb()
        where = (
            f"epoch={self.epoch_count}/micro_step={self.micro_step_count}/"
            f"global_step={self.global_step_count}"
        )
        current = self.batch_size / (self.step_elapsed_time + TIME_EPSILON)
        self.logging(
            f"{where}, RunningAvgSamplesPerSec={self.avg_samples_per_sec()}, "
            f"CurrSamplesPerSec={current}, MemAllocated={used:.2f}GB, MaxMemAllocated={peak:.2f}GB"
        )
        if self.monitor_memory:
            self.logging(
                f"{where}, vm %: {psutil.virtual_memory().percent}, swap %: {_swap_percent()}"
            )

    def avg_samples_per_sec(self) -> float:
        """Return samples per second over the counted steps; -inf before there are any."""
        steps = self.global_step_count - self.start_step
        if steps <= 0 or not self.total_elapsed_time:
            return float("-inf")
        return self.batch_size * steps / self.total_elapsed_time
