# SPDX-License-Identifier: Apache-2.0
"""The `optimizer` section made into an object, and which optimizers ZeRO is known to serve."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from deepspeed.comm.mesh import Mesh
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .constants import DEEPSPEED_OPTIMIZERS
from .zero.own_slice import shape_of
from .zero.utils import ZeRORuntimeException, is_zero_supported_optimizer

DeepSpeedOptimizerCallable = Callable[
    [list[torch.nn.Parameter] | list[dict[str, Any]]], torch.optim.Optimizer
]
DeepSpeedSchedulerCallable = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

# Types that reduce by themselves.
COMPRESSING = {"onebitadam": "OnebitAdam", "onebitlamb": "OnebitLamb", "zerooneadam": "ZeroOneAdam"}
# Those of the package mup (tensor programs V, arXiv:2203.03466): each makes an optimizer of torch with rates by width.
MUP_NAMES = {"muadam": "MuAdam", "muadamw": "MuAdamW", "musgd": "MuSGD"}
# What the native SGD takes; with anything else (maximize, …) torch's serves.
_CPU_SGD_OPTIONS = {"lr", "momentum", "dampening", "weight_decay", "nesterov"}


def make_optimizer(config: Any, params: list[Any]) -> torch.optim.Optimizer:
    """The optimizer of the `optimizer` section over `params`.

    Raises:
        AssertionError: for a type that neither we nor torch have.
        ValueError: for `max_grad_norm` among its parameters, or one that the optimizer does not take.
    """
    name = config.optimizer_name
    options = dict(config.optimizer_params or {})
    if "max_grad_norm" in options:
        raise ValueError(
            explain(
                "'max_grad_norm' is not supported as an optimizer parameter",
                got=options["max_grad_norm"],
                fix="set the top-level key gradient_clipping instead",
            )
        )
    if name.lower() == "muon":
        from .zero.muon.muon_optimizer import MuonWithAuxAdam, muon_groups

        return MuonWithAuxAdam(muon_groups(params, options))
    kind, options = _resolve(config, name, options)
    taken = inspect.signature(kind).parameters
    unknown = [key for key in options if key not in taken]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ValueError(
            explain(
                f"optimizer.params has keys that {kind.__name__} does not take",
                got=", ".join(unknown),
                expected=", ".join(k for k in taken if k not in ("params", "model_params")),
            )
        )
    return kind(params, **options)


def _resolve(config: Any, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Class and constructor arguments for an optimizer type."""
    lowered = name.lower()
    if lowered in ("adam", "adamw"):
        return _adam(config, lowered, options)
    on_host = _offloads(config)
    if lowered == "adagrad":
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        return (DeepSpeedCPUAdagrad if on_host else torch.optim.Adagrad), options
    if lowered == "lion":
        from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

        return (DeepSpeedCPULion if on_host else FusedLion), options
    if lowered in COMPRESSING:
        return _compressing(config, lowered), options
    if lowered in MUP_NAMES:
        return getattr(importlib.import_module("mup"), MUP_NAMES[lowered]), options
    if lowered == "lamb":
        from deepspeed.ops.lamb import FusedLamb

        return FusedLamb, options
    if name == "SGD" and on_host and not set(options) - _CPU_SGD_OPTIONS:
        from deepspeed.ops.sgd import DeepSpeedCPUSGD

        return DeepSpeedCPUSGD, options
    kind = getattr(torch.optim, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        raise AssertionError(
            explain(
                "unknown optimizer.type",
                got=name,
                expected=f"{', '.join(DEEPSPEED_OPTIMIZERS)}, or the name of a class of torch.optim",
            )
        )
    return kind, options


def set_optimizer_flags(config_class: Any, model: torch.nn.Module) -> None:
    """Say of each parameter, as `use_muon`, whether Muon steps it; nothing for other optimizers.

    It steps those of two dimensions and more, but for embeddings and the head (names with `embed` or `lm_head`).

    Args:
        config_class: the parsed configuration.
        model: whose parameters are marked; marks that are there are overwritten.
    """
    if config_class.optimizer_name != "muon":
        return
    for name, param in model.named_parameters():
        kept_out = any(part in name.lower() for part in ("embed", "lm_head"))
        param.use_muon = len(shape_of(param)) >= 2 and not kept_out


def _adam(config: Any, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    use_torch = options.pop("torch_adam", False)
    decoupled = options.pop("adam_w_mode", True) or name == "adamw"
    fp32_states = options.pop("fp32_optimizer_states", True)
    if config.bfloat16_config.enabled and config.bfloat16_config.bf16_optimizer_states:
        fp32_states = False
    if use_torch:
        return (torch.optim.AdamW if decoupled else torch.optim.Adam), options
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam, ZenFlowCPUAdam

    if _offloads(config):
        options |= {"adamw_mode": decoupled, "fp32_optimizer_states": fp32_states}
        zenflow = config.zero_config.zenflow
        if zenflow is not None:
            return ZenFlowCPUAdam, {**options, "overlap_step": zenflow.overlap_step}
        return DeepSpeedCPUAdam, options
    return FusedAdam, {**options, "adam_w_mode": decoupled}


def _compressing(config: Any, name: str) -> Any:
    """The class of an optimizer that exchanges compressed momentum.

    Raises:
        AssertionError: states are sharded, which leaves no rank a momentum of its own.
    """
    if config.zero_optimization_stage > 0:
        raise AssertionError(
            explain(
                f"{COMPRESSING[name]} is not compatible with ZeRO",
                got=f"zero_optimization.stage {int(config.zero_optimization_stage)}",
                expected="0",
                fix="remove section zero_optimization, or choose Adam",
            )
        )
    if not config.float16_config.enabled:
        logger.warning(f"{COMPRESSING[name]} is usually used with fp16")
    from .fp16 import onebit

    return getattr(onebit, COMPRESSING[name])


def join_ranks(optimizer: Any, mesh: Mesh) -> None:
    """Tell an optimizer that reduces by itself whom it averages with.

    Raises:
        NotImplementedError: its params are experts, whose ranks are others.
    """
    join = getattr(optimizer, "join", None)
    if join is None or not hasattr(optimizer, "reduces_itself"):
        return
    if any(not getattr(p, "allreduce", True) for g in optimizer.param_groups for p in g["params"]):
        raise NotImplementedError(
            explain(
                f"{type(optimizer).__name__} does not serve mixtures of experts",
                got="params of experts",
                expected="params that all data-parallel ranks share",
                fix="choose Adam",
            )
        )
    join(mesh.sequence_data)


def _offload_device(config: Any) -> Any:
    offload = config.zero_config.offload_optimizer
    return None if offload is None else getattr(offload.device, "value", offload.device)


def _offloads(config: Any) -> bool:
    return config.zero_optimization_stage > 0 and _offload_device(config) in ("cpu", "nvme")


def check_served(config: Any, optimizer: torch.optim.Optimizer, is_client: bool) -> None:
    """Refuse optimizers that cannot run, or are not known to run, on sharded states.

    Raises:
        AssertionError: an optimizer that ZeRO is not known to serve, unless `zero_allow_untested_optimizer` is set.
        ZeRORuntimeException: states in CPU memory with an optimizer that was not made for it.
    """
    if config.zero_optimization_stage == 0:
        return
    name = type(optimizer).__name__
    if not config.zero_allow_untested_optimizer and not is_zero_supported_optimizer(optimizer):
        raise AssertionError(
            explain(
                "You are using an untested ZeRO Optimizer",
                got=name,
                expected="Adam, AdamW or Adagrad of torch, or one of deepspeed.ops",
                fix='add "zero_allow_untested_optimizer": true to the configuration to use it all the same',
            )
        )
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.lion import DeepSpeedCPULion
    from deepspeed.ops.sgd import DeepSpeedCPUSGD

    if hasattr(optimizer, "needs_whole") and _offload_device(config) == "nvme":
        raise ZeRORuntimeException(
            explain(
                f"{name} steps whole matrices and cannot have its states in files",
                got="zero_optimization.offload_optimizer.device nvme",
                expected="cpu, or no offload_optimizer section",
            )
        )
    made_for_host = (DeepSpeedCPUAdam, DeepSpeedCPULion, DeepSpeedCPUAdagrad, DeepSpeedCPUSGD)
    if (
        is_client
        and _offloads(config)
        and config.zero_force_ds_cpu_optimizer
        and not isinstance(optimizer, made_for_host)
    ):
        raise ZeRORuntimeException(
            explain(
                "You are using ZeRO-Offload with a client provided optimizer that was not made for CPU memory",
                got=name,
                expected="deepspeed.ops.adam.DeepSpeedCPUAdam",
                fix='use it, or set "zero_force_ds_cpu_optimizer": false to accept a slower step',
            )
        )
