# SPDX-License-Identifier: Apache-2.0
"""What is refused before an engine is built, or while it runs: requests that cannot work together."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger, set_log_level_from_string

from .config_unbuilt import refuse_unbuilt


def accept(config: Any, optimizer: Any, lr_scheduler: Any) -> Any:
    """The parsed configuration, if everything that it asks for is built.

    A client's optimizer or scheduler makes the configuration's section of that name idle.

    Raises:
        DeepSpeedConfigError: naming the key of what is not.
    """
    refuse_unbuilt(
        config, client_optimizer=optimizer is not None, client_scheduler=lr_scheduler is not None
    )
    return config


def check_request(config: Any, model: torch.nn.Module, optimizer: Any, lr_scheduler: Any) -> None:
    """Refuse combinations of arguments that cannot work; the configured log level holds from here on.

    Raises:
        AssertionError: ZeRO 1 or 2 without an optimizer, or with an odd allgather_bucket_size; overlap_comm below
            stage 2 with unmanaged accumulation; fp32 states where bf16 ones are asked for; a scheduler
            object of torch's older base class without an optimizer.
        ValueError: nothing to train; Muon with both of optimizer offload and an explicit `reduce_scatter`.
    """
    if config.log_level is not None:
        set_log_level_from_string(config.log_level)
    has_optimizer = optimizer is not None or config.optimizer_name is not None
    if config.zero_optimization_stage in (1, 2) and not has_optimizer:
        raise AssertionError(
            explain(
                f"ZeRO stage {int(config.zero_optimization_stage)} shards optimizer states, but there is no optimizer",
                got="neither optimizer= nor an 'optimizer' section",
                expected="one of the two",
                fix="add one, or set zero_optimization.stage to 0",
            )
        )
    _check_zero(config, optimizer)
    _check_scheduler(optimizer, lr_scheduler)
    if has_optimizer and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            explain(
                "the model has no trainable parameter",
                got=f"{sum(1 for _ in model.parameters())} parameters, all with requires_grad=False",
                expected="at least one with requires_grad=True",
                fix="unfreeze some, or initialize without an optimizer for inference",
            )
        )


def _check_zero(config: Any, optimizer: Any) -> None:
    zero, stage = config.zero_config, config.zero_optimization_stage
    wide = getattr(optimizer, "fp32_optimizer_states", False)
    if wide and config.bfloat16_config.bf16_optimizer_states and zero.offload_optimizer is not None:
        raise AssertionError(
            explain(
                "bf16_optimizer_states needs an optimizer that keeps its states in bf16",
                got=f"{type(optimizer).__name__}, which keeps them in fp32",
                expected=f"{type(optimizer).__name__}(..., fp32_optimizer_states=False)",
                fix="construct it so, or leave bf16_optimizer_states out",
            )
        )
    if stage in (1, 2) and zero.allgather_bucket_size % 2:
        raise AssertionError(
            explain(
                "allgather_bucket_size must be a multiple of nccl_start_alignment_factor, which is 2",
                got=zero.allgather_bucket_size,
                expected="an even number",
            )
        )
    if (
        stage in (1, 2)
        and config.optimizer_name == "muon"
        and zero.offload_optimizer is not None
        and "reduce_scatter" in zero.model_fields_set
        and zero.reduce_scatter
    ):
        raise ValueError(
            explain(
                "Muon with reduce scatter does not support optimizer offload",
                got="'reduce_scatter': true and 'offload_optimizer'",
                fix="remove 'reduce_scatter': gradients then go to where the states are",
            )
        )
    if stage < 2 and zero.overlap_comm and not config.managed_gradient_accumulation:
        raise AssertionError(
            explain(
                "unmanaged accumulation goes with overlap_comm only with ZeRO stage 2 or 3",
                got=f"stage {int(stage)}, which reduces inside step()",
                fix="set overlap_comm to false, or the stage to 2",
            )
        )


def _check_scheduler(optimizer: Any, lr_scheduler: Any) -> None:
    """Say so where a scheduler object cannot be driving the optimizer that will be trained with."""
    is_object = isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    if not is_object or isinstance(optimizer, torch.optim.Optimizer):
        return
    message = explain(
        "a scheduler object changes the rates of the optimizer that it was made with, and that one is not trained with",
        got=f"lr_scheduler={type(lr_scheduler).__name__}, optimizer={optimizer!r}",
        expected="both as objects, or the scheduler as a callable",
        fix="pass optimizer= as well, or lr_scheduler=lambda optimizer: ...",
    )
    # torch's own schedulers no longer derive from the older name, by which this combination was refused
    if isinstance(lr_scheduler, torch.optim.lr_scheduler._LRScheduler):
        raise AssertionError(message)
    logger.warning(message)


def check_coalescing(engine: Any) -> None:
    """Refuse `coalesce_grad_reduction` where it has no meaning.

    Raises:
        NotImplementedError: below stage 1, or with pipeline parallelism.
        AssertionError: with unmanaged accumulation, or inside `no_sync`.
    """
    if engine.plan.stage == 0 or engine.pipeline_parallelism:
        raise NotImplementedError(
            explain(
                "coalesce_grad_reduction needs ZeRO stage 1, 2 or 3, and no pipeline parallelism",
                got="a pipeline" if engine.pipeline_parallelism else "stage 0",
                fix="use no_sync() for all but the last backward pass",
            )
        )
    if engine.clock.unsynchronized:
        raise AssertionError(
            explain(
                "coalesce_grad_reduction() cannot be nested in itself or in no_sync()",
                fix="leave the outer context first",
            )
        )
    if not engine.clock.managed:
        raise AssertionError(
            explain(
                "coalesce_grad_reduction needs managed accumulation",
                got="managed_gradient_accumulation: false",
            )
        )
