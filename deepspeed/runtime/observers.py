# SPDX-License-Identifier: Apache-2.0
"""What watches a run without taking part in it: timers, throughput, monitors, the progress line."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from deepspeed.utils.logging import log_dist
from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer, ThroughputTimer

from .eigenvalue import summary_events

# Timer names by engine event: of one micro-step, and summed up between two lines of output.
_MICRO = {"forward": "fwd_microstep", "backward": "bwd_microstep", "step": "step_microstep"}
_TOTAL = {"forward": "fwd", "backward": "bwd", "step": "step"}


def build_observers(engine: Any) -> Observers:
    """The observers that the engine's configuration asks for; sets `engine.timers`, `.tput_timer` and `.monitor`."""
    config = engine._config
    engine.timers = SynchronizedWallClockTimer() if config.wall_clock_breakdown else NoopTimer()
    engine.tput_timer = ThroughputTimer(
        config.timers_config,
        batch_size=config.train_batch_size,
        steps_per_output=config.steps_per_print,
        monitor_memory=False,
    )
    engine.monitor = _build_monitor(config)
    engine.flops_profiler = _build_flops_profiler(engine)
    engine.tuning_probe = _build_tuning_probe(config)
    return Observers(config.wall_clock_breakdown, config.steps_per_print, config.memory_breakdown)


def _build_flops_profiler(engine: Any) -> Any:
    section = engine._config.flops_profiler_config
    if not section.enabled:
        return None
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    return FlopsProfiler(engine.module, engine, section.recompute_fwd_factor)


def _build_tuning_probe(config: Any) -> Any:
    if not config.autotuning_config.enabled:
        return None
    from deepspeed.autotuning.probe import TuningProbe

    return TuningProbe(config.autotuning_config)


def _build_monitor(config: Any) -> Any:
    if not config.monitor_config.enabled:
        return NoMonitor()
    from deepspeed.monitor.monitor import MonitorMaster

    return MonitorMaster(config.monitor_config)


class NoMonitor:
    """Stands for the monitors of a run that has none."""

    enabled = False

    def write_events(self, events: list[tuple[str, Any, int]]) -> None:
        """Write nothing."""


class Observers:
    """Brackets the engine's events.

    Args:
        breakdown: time forward, backward and step, and print the times.
        steps_per_print: optimizer steps between two lines; None for no lines.
        memory: print memory use around every event.
    """

    def __init__(self, breakdown: bool, steps_per_print: float | None, memory: bool) -> None:
        self.breakdown, self.memory = breakdown, memory
        self._losses: list[torch.Tensor] = []
        self._last_step: float | None = None
        self.steps_per_print = (
            steps_per_print if steps_per_print and math.isfinite(steps_per_print) else None
        )

    def during(self, event: str, engine: Any) -> contextlib.AbstractContextManager:
        """The extent of one event: "forward", "backward" or "step"."""
        if event == "forward" and self._profiles(engine):
            return self._profiled(engine)
        if self.breakdown or self.memory:
            return self._timed(event, engine)
        if event == "forward" and engine.training:
            engine.tput_timer.start()
        return contextlib.nullcontext()

    def _profiles(self, engine: Any) -> bool:
        """Whether this forward pass is one that the flops profiler is to count, on the rank that prints."""
        return (
            engine.flops_profiler is not None
            and engine.training
            and engine.global_rank == 0
            and engine.global_steps == engine.flops_profiler_profile_step()
        )

    @contextlib.contextmanager
    def _profiled(self, engine: Any) -> Iterator[None]:
        with self._timed("forward", engine):
            engine.flops_profiler.start_profile()
            try:
                yield
            finally:
                engine.flops_profiler.stop_profile()

    def _report_flops(self, engine: Any) -> None:
        profiler = engine.flops_profiler
        if profiler is None or not profiler.records:
            return
        profiler.print_model_profile(
            profile_step=engine.flops_profiler_profile_step(),
            module_depth=engine.flops_profiler_module_depth(),
            top_modules=engine.flops_profiler_top_modules(),
            detailed=engine.flops_profiler_detailed(),
            output_file=engine.flops_profiler_output_file(),
        )
        profiler.end_profile()

    @contextlib.contextmanager
    def _timed(self, event: str, engine: Any) -> Iterator[None]:
        if event == "forward" and engine.training:
            engine.tput_timer.start()
        self._report_memory(f"before {event}")
        names = (_MICRO[event], _TOTAL[event])
        for name in names:
            engine.timers(name).start()
        try:
            yield
        finally:
            for name in names:
                engine.timers(name).stop()
        self._report_memory(f"after {event}")

    def after_step(self, engine: Any, boundary: bool) -> None:
        """Called at the end of `engine.step()`."""
        if boundary and engine.monitor.enabled:
            engine.monitor.write_events(_events(engine) + self._course(engine))
        if boundary:
            self._report_flops(engine)
        engine.tput_timer.stop(global_step=boundary, report_speed=self._due(engine.global_steps))
        if self.breakdown:
            engine.timers.log(list(_MICRO.values()))
            if boundary and self._due(engine.global_steps):
                engine.timers.log(list(_TOTAL.values()))
        if boundary and engine.tuning_probe is not None:
            engine.tuning_probe.after_step(engine)

    def saw_loss(self, engine: Any, share: Any) -> None:
        """Called with one micro-batch's part of the step's loss, for the monitors."""
        if engine.monitor.enabled:
            self._losses.append(share.detach().float())

    def _course(self, engine: Any) -> list[tuple[str, Any, int]]:
        """This rank's view of the step: loss, gradient norm, speed since the last one, memory."""
        at, now = engine.global_samples, time.perf_counter()
        events: list[tuple[str, Any, int]] = []
        if self._losses:
            events.append(("Train/Samples/train_loss", sum(self._losses).item(), at))
        norm = engine.get_global_grad_norm()
        if norm is not None:
            events.append(("Train/Samples/grad_norm", float(norm), at))
        if self._last_step is not None:
            speed = engine.train_batch_size() / max(now - self._last_step, 1e-9)
            events.append(("Train/Samples/samples_per_second", speed, at))
        events.append(("Train/Samples/memory_gb", memory_in_use(engine.device) / 2**30, at))
        self._losses, self._last_step = [], now
        return events

    def progress(self, engine: Any, step: int) -> None:
        """Log the progress line where it is due."""
        if self._due(step):
            log_dist(
                f"step={step}, skipped={engine.skipped_steps}, lr={engine.get_lr()}, mom={engine.get_mom()}",
                ranks=[0],
            )

    def _due(self, step: int) -> bool:
        return self.steps_per_print is not None and step % self.steps_per_print == 0

    def _report_memory(self, message: str) -> None:
        if self.memory:
            from .utils import see_memory_usage

            see_memory_usage(message, force=True)


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process holds: of the accelerator's memory, or of the host's where it runs there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _events(engine: Any) -> list[tuple[str, Any, int]]:
    at = engine.global_samples
    rates = engine.get_lr()
    events = [("Train/Samples/lr", rates[0], at)] if rates else []
    if engine.fp16_enabled():
        events.append(
            ("Train/Samples/loss_scale", getattr(engine.optimizer, "loss_scale", 1.0), at)
        )
    if engine.block_eigenvalue:  # left there by a script that measures them
        events += summary_events(engine.block_eigenvalue, at)
    if engine.wall_clock_breakdown():
        for event in ("forward", "backward", "step"):
            elapsed = engine.timers(_MICRO[event]).elapsed(reset=False)
            events.append((f"Train/Samples/elapsed_time_ms_{event}", elapsed, at))
    return events
