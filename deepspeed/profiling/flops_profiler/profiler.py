# SPDX-License-Identifier: Apache-2.0
"""What each module of a model costs in one forward pass: operations, params, time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain
from deepspeed.utils.module_utils import evaluating

from . import report
from .counting import OperatorWatch
from .formatting import (
    duration_to_string,
    macs_to_string,
    number_to_string,
    params_to_string,
)

__all__ = ["FlopsProfiler", "ModuleProfile", "get_model_profile"]


@dataclass
class ModuleProfile:
    """What one module did, with all that lies below it."""

    params: int = 0
    """Params, whole ones where ZeRO shards them; each counted once."""
    flops: int = 0
    """Floating-point operations of its forward calls."""
    macs: int = 0
    """Multiply-accumulates among them."""
    duration: float = 0.0
    """Seconds inside its forward calls."""
    ignored: bool = False
    """Its type was in the ignore list: what it does counts for nobody."""


class FlopsProfiler:
    """Counts what a model does between `start_profile` and `stop_profile`.

    Counting looks at every operator that runs, so times taken meanwhile are some microseconds an operator too long.

    Args:
        model: the module to profile.
        ds_engine: the engine around it; adds ranks, batch sizes, backward and step to the report.
        recompute_fwd_factor: part of the forward pass that activation checkpointing repeats, 0.0 to 1.0.

    Example:
        >>> profiler = FlopsProfiler(torch.nn.Linear(4, 8))
        >>> profiler.start_profile()
        >>> _ = profiler.model(torch.zeros(3, 4))
        >>> profiler.stop_profile()
        >>> profiler.get_total_macs()
        96
    """

    def __init__(
        self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0
    ) -> None:
        self.model = model
        self.ds_engine = ds_engine
        self.recompute_fwd_factor = recompute_fwd_factor
        self.records: dict[nn.Module, ModuleProfile] = {}
        self.started = False
        self.flops = self.macs = self.params = 0
        self._open: list[tuple[nn.Module, float]] = []
        self._hooks: list[Any] = []
        self._watch: OperatorWatch | None = None

    # - when

    def start_profile(self, ignore_list: Iterable[type] | None = None) -> None:
        """Begin to count, from zero.

        Args:
            ignore_list: module classes whose work counts neither for them nor for what is around them.
        """
        self._start(tuple(ignore_list or ()), count=True)

    def _start(self, ignored: tuple[type, ...], count: bool) -> None:
        self.end_hooks()
        if count:
            self.reset_profile()
            for module, record in self.records.items():
                record.ignored = isinstance(module, ignored)
        for record in self.records.values():
            record.duration = 0.0
        for module in self.records:
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        if count:
            self._watch = OperatorWatch(self._count)
            self._watch.__enter__()
        self.started = True

    def stop_profile(self) -> None:
        """Stop to count; the numbers stay."""
        if not self.started:
            return
        self.end_hooks()
        root = self.records[self.model]
        self.flops, self.macs, self.params = root.flops, root.macs, root.params

    def end_hooks(self) -> None:
        """Take everything off the model that `start_profile` put there."""
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._open, self.started = [], [], False

    def reset_profile(self) -> None:
        """Set every count to zero, and see the model anew."""
        self.records = {
            module: ModuleProfile(params=count_params(module)) for module in self.model.modules()
        }

    def end_profile(self) -> None:
        """Stop, and forget the counts of the modules (the totals stay as attributes)."""
        self.stop_profile()
        self.records = {}

    # - what is seen

    def _enter(self, module: nn.Module, args: Any) -> None:
        get_accelerator().synchronize()
        self._open.append((module, time.perf_counter()))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open or self._open[-1][0] is not module:
            return  # the forward pass began before the profile
        get_accelerator().synchronize()
        _, began = self._open.pop()
        if all(other is not module for other, _ in self._open):  # a recursion counts once
            self.records[module].duration += time.perf_counter() - began

    def _count(self, flops: int, macs: int) -> None:
        inside = {module: self.records[module] for module, _ in self._open}
        if any(record.ignored for record in inside.values()):
            return
        for record in inside.values():
            record.flops += flops
            record.macs += macs

    # - totals

    def _total(self, name: str) -> Any:
        if self.records:
            return getattr(self.records[self.model], name)
        return getattr(self, name, 0)

    def get_total_flops(self, as_string: bool = False) -> Any:
        """Floating-point operations of the forward pass."""
        total = self._total("flops")
        return number_to_string(total) if as_string else total

    def get_total_macs(self, as_string: bool = False) -> Any:
        """Multiply-accumulates of the forward pass."""
        total = self._total("macs")
        return macs_to_string(total) if as_string else total

    def get_total_duration(self, as_string: bool = False) -> Any:
        """Seconds of the forward pass."""
        total = self._total("duration")
        return duration_to_string(total) if as_string else total

    def get_total_params(self, as_string: bool = False) -> Any:
        """Params of the model."""
        total = self._total("params")
        return params_to_string(total) if as_string else total

    # - reports

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Print totals, the heaviest modules of each depth, and the model with each module's numbers.

        Args:
            profile_step: step that the report names.
            module_depth: depth of the second table; -1 is the deepest.
            top_modules: modules listed at each depth.
            detailed: print the model as well.
            output_file: file to write instead of stdout; its folder is made.
        """
        if not self.records:
            return
        depth = report.Depth(module_depth, top_modules, detailed)
        report.deliver(report.whole(self, profile_step, depth), output_file)

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Print the heaviest modules of each depth.

        Args:
            module_depth: depth to list; -1 lists all of them.
            top_modules: modules listed at each depth.
        """
        if self.records:
            print("\n".join(report.aggregated(self.model, self.records, module_depth, top_modules)))


def count_params(module: nn.Module) -> int:
    """Elements of a module's params, each counted once; whole ones where ZeRO-3 shards them."""
    return sum(getattr(param, "ds_numel", param.numel()) for param in module.parameters())


_MODES = ("forward", "generate")


def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Iterable[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Iterable[type] | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """Profile one forward pass of a model in evaluation mode.

    Args:
        model: any module; its mode comes back as it was.
        input_shape: shape of the only input, filled with ones of the params' dtype; otherwise give `args` or `kwargs`.
        args, kwargs: inputs of the model.
        print_profile: print the report.
        detailed, module_depth, top_modules, output_file: as in `FlopsProfiler.print_model_profile`.
        warm_up: passes before the one that counts.
        as_string: return strings as ``"1.5 GMACs"`` instead of integers.
        ignore_modules: classes of modules whose work does not count.
        mode: "forward", or "generate" to call `model.generate`.

    Returns:
        `(flops, multiply-accumulates, params)`.

    Raises:
        ValueError: no input, or an unknown mode.

    Example:
        >>> get_model_profile(torch.nn.Linear(4, 8), (3, 4), print_profile=False, as_string=False)
        (192, 96, 40)
    """
    call = _caller(model, input_shape, list(args), dict(kwargs or {}), mode)
    profiler = FlopsProfiler(model)
    _pass(profiler, call, warm_up, tuple(ignore_modules or ()))
    if print_profile:
        profiler.print_model_profile(
            profile_step=warm_up,
            module_depth=module_depth,
            top_modules=top_modules,
            detailed=detailed,
            output_file=output_file,
        )
    found = (
        profiler.get_total_flops(as_string),
        profiler.get_total_macs(as_string),
        profiler.get_total_params(as_string),
    )
    profiler.end_profile()
    return found


def _pass(profiler: FlopsProfiler, call: Any, warm_up: int, ignored: tuple[type, ...]) -> None:
    """Warm up, count one pass, and time another: counting costs time."""
    with evaluating(profiler.model), torch.no_grad():
        try:
            for _ in range(warm_up):
                call()
            for count in (True, False):
                profiler._start(ignored, count)
                call()
                profiler.stop_profile()
        finally:
            profiler.end_hooks()


def _caller(
    model: nn.Module,
    shape: tuple[int, ...] | None,
    args: list[Any],
    kwargs: dict[str, Any],
    mode: str,
) -> Any:
    if mode not in _MODES:
        raise ValueError(
            explain("unknown mode of get_model_profile", got=mode, expected="forward or generate")
        )
    if shape is not None:
        weight = next(model.parameters(), torch.empty(0))
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        args = [torch.ones(tuple(shape), dtype=dtype, device=weight.device), *args]
    if not args and not kwargs:
        raise ValueError(
            explain(
                "get_model_profile needs an input",
                fix="Give input_shape=(1, 3, 224, 224), or args=[...], or kwargs={...}.",
            )
        )
    run = model.generate if mode == "generate" else model
    return lambda: run(*args, **kwargs)
