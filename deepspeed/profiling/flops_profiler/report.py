# SPDX-License-Identifier: Apache-2.0
"""The profile as text: totals, the heaviest modules by depth, the model with each module's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from deepspeed.utils.timer import (
    BACKWARD_MICRO_TIMER,
    FORWARD_MICRO_TIMER,
    STEP_MICRO_TIMER,
)

from .formatting import (
    duration_to_string,
    flops_to_string,
    macs_to_string,
    number_to_string,
    params_to_string,
)

WIDTH = 78

_HEAD = """Notations:
data parallel size (dp_size), model parallel size(mp_size),
number of parameters (params), number of multiply-accumulate operations(MACs),
number of floating-point operations (flops), floating-point operations per second (FLOPS),
fwd latency (forward propagation latency), bwd latency (backward propagation latency),
step (weights update latency), iter latency (sum of fwd, bwd and step latency)
"""

_NOTES = """Each module is followed by, in this order:
params, percentage of total params, MACs, percentage of total MACs, fwd latency, percentage of total fwd latency, fwd FLOPS

Notes:
1. Work that a module does itself, outside of its submodules, is the difference between its numbers and their sum.
2. The number of operations follows from shapes; FLOPS beyond the machine's peak mean that some were never done.
3. Latencies are taken at the modules, with the device idle before and after each.
"""


@dataclass(frozen=True)
class Depth:
    """How much of the model a report shows."""

    module_depth: int
    """Depth that the table of the heaviest modules shows; -1 shows all."""
    top_modules: int
    """Modules listed at each depth."""
    detailed: bool
    """Show the whole model as well."""


def deliver(lines: list[str], output_file: str | None) -> None:
    """Print the lines, or write them to a file whose folder is made."""
    if not output_file:
        print("\n".join(lines), flush=True)
        return
    path = Path(output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def whole(profiler: Any, step: int, depth: Depth) -> list[str]:
    """The report's lines."""
    lines = ["", " DeepSpeed Flops Profiler ".center(WIDTH, "-")]
    lines += [f"Profile Summary at step {step}:", _HEAD]
    lines += [f"{name + ':':<72}{value:<8}" for name, value in _totals(profiler)]
    lines += ["", " Aggregated Profile per GPU ".center(WIDTH + 8, "-")]
    lines += aggregated(profiler.model, profiler.records, depth.module_depth, depth.top_modules)
    if depth.detailed:
        lines += ["", " Detailed Profile per GPU ".center(WIDTH + 8, "-"), _NOTES]
        lines += detail(profiler.model, profiler.records)
    return [*lines, "-" * WIDTH]


def _totals(profiler: Any) -> Iterator[tuple[str, str]]:
    engine = profiler.ds_engine
    total = profiler.records[profiler.model]
    ranks = 1
    if engine is not None:
        ranks = engine.mp_world_size
        yield "world size", str(engine.world_size)
        yield "data parallel size", str(engine.dp_world_size)
        yield "model parallel size", str(ranks)
        yield "batch size per GPU", str(engine.train_micro_batch_size_per_gpu())
    yield "params per GPU", params_to_string(total.params)
    yield "params of model = params per GPU * mp_size", params_to_string(total.params * ranks)
    yield "fwd MACs per GPU", macs_to_string(total.macs)
    yield "fwd flops per GPU", number_to_string(total.flops)
    flops_of_model = number_to_string(total.flops * ranks)
    yield "fwd flops of model = fwd flops per GPU * mp_size", flops_of_model
    forward = _seconds(engine, FORWARD_MICRO_TIMER) or total.duration
    yield "fwd latency", duration_to_string(forward)
    speed = flops_to_string(_per_second(total.flops, forward))
    yield "fwd FLOPS per GPU = fwd flops per GPU / fwd latency", speed
    if engine is not None:
        yield from _whole_step(profiler, total.flops, forward)


def _whole_step(profiler: Any, flops: int, forward: float) -> Iterator[tuple[str, str]]:
    engine = profiler.ds_engine
    backward, step = _seconds(engine, BACKWARD_MICRO_TIMER), _seconds(engine, STEP_MICRO_TIMER)
    if backward:
        again = profiler.recompute_fwd_factor
        yield "bwd latency", duration_to_string(backward)
        yield (
            f"bwd FLOPS per GPU = {2 + again:g} * fwd flops per GPU / bwd latency",
            flops_to_string(_per_second((2 + again) * flops, backward)),
        )
        yield (
            f"fwd+bwd FLOPS per GPU = {3 + again:g} * fwd flops per GPU / (fwd+bwd latency)",
            flops_to_string(_per_second((3 + again) * flops, forward + backward)),
        )
    if step:
        yield "step latency", duration_to_string(step)
    whole_time = forward + backward + step
    yield "iter latency", duration_to_string(whole_time)
    samples = engine.train_micro_batch_size_per_gpu() * engine.world_size
    yield "samples/second", str(round(_per_second(samples, whole_time), 2))


def _seconds(engine: Any, timer: str) -> float:
    """Seconds that an engine's timer saw in this micro-step; 0.0 where there is none."""
    if engine is None or not engine.wall_clock_breakdown():
        return 0.0
    return engine.timers(timer).elapsed(reset=False) / 1000.0


def _per_second(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


# - the heaviest modules


def aggregated(
    model: nn.Module, records: Mapping[nn.Module, Any], module_depth: int, top_modules: int
) -> list[str]:
    """Params, MACs and latency by class name at each depth: the largest `top_modules` of each."""
    levels: list[dict[str, list[float]]] = []
    _collect(model, records, 0, levels)
    shown = range(len(levels)) if module_depth < 0 else [min(module_depth, len(levels) - 1)]
    lines = [
        f"Top {top_modules} modules in terms of params, MACs or fwd latency at different model depths:"
    ]
    kinds = (
        ("params     ", params_to_string),
        ("MACs       ", macs_to_string),
        ("fwd latency", duration_to_string),
    )
    for level in shown:
        lines.append(f"depth {level}:")
        for place, (name, text) in enumerate(kinds):
            ranked = sorted(levels[level].items(), key=lambda item: -item[1][place])[:top_modules]
            lines.append(f"    {name} - { {kind: text(sums[place]) for kind, sums in ranked} }")
    return lines


def _collect(
    module: nn.Module,
    records: Mapping[nn.Module, Any],
    depth: int,
    levels: list[dict[str, list[float]]],
) -> None:
    if len(levels) <= depth:
        levels.append({})
    record = records.get(module)
    if record is None:
        return
    sums = levels[depth].setdefault(type(module).__name__, [0, 0, 0.0])
    for place, value in enumerate((record.params, record.macs, record.duration)):
        sums[place] += value
    for child in module.children():
        _collect(child, records, depth + 1, levels)


# - the model


def detail(model: nn.Module, records: Mapping[nn.Module, Any]) -> list[str]:
    """The model as Python prints it, each module's numbers before its own words."""
    return _describe(model, records, records[model])


def _describe(module: nn.Module, records: Mapping[nn.Module, Any], total: Any) -> list[str]:
    record = records.get(module)
    numbers = _numbers(record, total) if record is not None else "not profiled"
    words = module.extra_repr().splitlines()
    children = list(module.named_children())
    if not children:
        return [f"{type(module).__name__}({', '.join([numbers, *words])})"]
    lines = [f"{type(module).__name__}(", f"  {', '.join([numbers, *words])}"]
    for name, child in children:
        first, *rest = _describe(child, records, total)
        lines.append(f"  ({name}): {first}")
        lines += [f"  {line}" for line in rest]
    return [*lines, ")"]


def _numbers(record: Any, total: Any) -> str:
    return ", ".join(
        (
            f"{params_to_string(record.params)} = {_percent(record.params, total.params)} Params",
            f"{macs_to_string(record.macs)} = {_percent(record.macs, total.macs)} MACs",
            f"{duration_to_string(record.duration)} = "
            f"{_percent(record.duration, total.duration)} latency",
            flops_to_string(_per_second(record.flops, record.duration)),
        )
    )


def _percent(part: float, whole_: float) -> str:
    return f"{round(100.0 * part / whole_, 2):g}%" if whole_ else "0%"
