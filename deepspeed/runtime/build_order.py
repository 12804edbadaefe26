# SPDX-License-Identifier: Apache-2.0
"""In which order an engine's optimizer steps: plainly, or as ZenFlow or SuperOffload have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deepspeed.utils.errors import DeepSpeedConfigError, explain
from deepspeed.utils.logging import logger

from .zero.plan import Plan

# SuperOffload's unit of work: large enough for all cores, small enough to begin early.
_TRIAL_NUMEL = 16 * 1024 * 1024


def super_offloads(zero: Any) -> bool:
    """Whether section `zero_optimization` asks for SuperOffload, which stage 3 has."""
    offload = zero.offload_optimizer
    return int(zero.stage) == 3 and offload is not None and bool(offload.super_offload)


def plan_for_order(zero: Any, plan: Plan) -> Plan:
    """The row of states in host memory, as the order of the step needs it."""
    if super_offloads(zero):
        numel = min(int(zero.sub_group_size) or 1, _TRIAL_NUMEL)
        return replace(plan, masters_apart=True, part_numel=numel)
    if zero.zenflow is not None and zero.zenflow.overlap_step:
        return replace(plan, masters_apart=True)
    return plan


def bytes_beside(zero: Any, widths: Any) -> int:
    """Bytes per element that the order of the step keeps beside states in host memory.

    Args:
        zero: section `zero_optimization`, parsed.
        widths: bytes of masters and states.
    """
    if super_offloads(zero):
        return widths.master + widths.state * widths.states
    if zero.zenflow is not None:
        return 8 if zero.zenflow.overlap_step else 4
    return 0


def set_order(engine: Any, optimizer: Any) -> None:
    """Give a sharded optimizer the order that the configuration asks for.

    Raises:
        DeepSpeedConfigError: both orders, or one that finds states elsewhere than it needs them, or another rule.
    """
    zero = engine._config.zero_config
    asked = zero.offload_optimizer is not None and zero.offload_optimizer.super_offload
    if asked and not super_offloads(zero):
        logger.warning(
            f"offload_optimizer.super_offload does nothing at ZeRO stage {int(zero.stage)}: it is for stage 3"
        )
    if engine.plan.stage == 0:
        return
    if super_offloads(zero):
        if zero.zenflow is not None:
            raise DeepSpeedConfigError(
                explain(
                    "ZenFlow and SuperOffload are two orders of one step",
                    got="'zenflow' and 'offload_optimizer.super_offload'",
                    expected="one of the two",
                )
            )
        from .superoffload.order import SuperOffload

        share, clock = zero.offload_optimizer.cpuadam_cores_perc, engine.clock
        optimizer.order = SuperOffload(optimizer, lambda: clock.at_boundary, share)
    elif zero.zenflow is not None:
        from .zenflow.order import ZenFlow
        from .zenflow.settings import Settings

        epoch = _steps_per_epoch(engine)
        if zero.zenflow.select_strategy == "epoch" and not (zero.zenflow.steps_per_epoch or epoch):
            logger.warning(
                "zenflow.select_strategy epoch: the engine has no training_data, so columns are chosen once; "
                "pass training_data, or set zenflow.steps_per_epoch"
            )
        optimizer.order = ZenFlow(optimizer, Settings.of(zero.zenflow, epoch))


def _steps_per_epoch(engine: Any) -> int | None:
    """Optimizer steps to an epoch of the engine's own loader; None without one, or without a length."""
    try:
        batches = len(engine.training_dataloader)
    except TypeError:
        return None
    return max(1, batches // engine._config.gradient_accumulation_steps)
