# SPDX-License-Identifier: Apache-2.0
"""What `deepspeed.initialize` does: find the configuration, join the processes, make the engine."""

from __future__ import annotations

import sys
from typing import Any

import torch

from deepspeed.comm import comm as dist
from deepspeed.git_version_info import git_branch, git_hash, version
from deepspeed.utils.errors import DeepSpeedConfigError, explain
from deepspeed.utils.logging import log_dist, logger

from .config import DeepSpeedConfig, load_config
from .engine import DeepSpeedEngine
from .optimizers import set_optimizer_flags
from .tensor_parallel.request import TPRequest, merged, request_of, tensor_ranks
from .zero.init_context import restore_init_context, shutdown_init_context


def initialize(
    args: Any,
    model: torch.nn.Module | None,
    *,
    config: Any,
    distributed_port: int,
    mesh_param: tuple[int, int] | None,
    tp_request: TPRequest | None = None,
    **engine_arguments: Any,
) -> tuple[Any, Any, Any, Any]:
    """See `deepspeed.initialize`."""
    if model is None:
        raise AssertionError(
            explain(
                "deepspeed.initialize requires a model", got="model=None", expected="a torch module"
            )
        )
    # before anything can fail; other libraries' tests look for these words
    told = f"version={version}, git-hash={git_hash}, git-branch={git_branch}"
    log_dist(f"DeepSpeed info: {told}", ranks=[0])
    config = find_config(args, config)
    dist.init_distributed(
        dist_backend=None,
        distributed_port=distributed_port,
        dist_init_required=engine_arguments["dist_init_required"],
    )
    config = _with_tensor_ranks(load_config(config), model, engine_arguments, tp_request)
    engine_class = _engine_class(model, engine_arguments)
    mpu = engine_arguments["mpu"]
    mesh_device = None
    if mesh_param is not None:
        mesh_device = dist.initialize_mesh_device(
            mesh_param, ("data_parallel", "sequence_parallel")
        )
    parsed = DeepSpeedConfig(config, mpu, mesh_device=mesh_device)
    if parsed.comms_config.comms_logger_enabled:
        dist.configure(parsed)
    set_optimizer_flags(parsed, model)
    if parsed.hybrid_engine.enabled:
        engine_class = _hybrid_class(engine_class)
    shutdown_init_context()  # modules that the engine builds for itself stay whole
    try:
        engine = engine_class(
            args,
            model,
            config=config,
            config_class=parsed,
            mesh_device=mesh_device,
            **engine_arguments,
        )
    finally:
        restore_init_context()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _with_tensor_ranks(
    config: dict[str, Any], model: torch.nn.Module, engine_arguments: dict[str, Any], pending: Any
) -> dict[str, Any]:
    """The configuration with what `tp_model_init` was asked for; the engine's `mpu` knows the groups then.

    Raises:
        ValueError: the request, the configuration and the mpu contradict each other.
        DeepSpeedConfigError: the configuration asks for another kind of splitting beside.
    """
    request = request_of(model, pending)
    whole = merged(config, request, engine_arguments["mpu"])
    mpu = tensor_ranks(whole, engine_arguments["mpu"], request)
    if mpu is not engine_arguments["mpu"] and _is_pipeline(model):
        raise DeepSpeedConfigError(
            explain(
                "a PipelineModule's layers cannot be divided over tensor-parallel ranks",
                got="tensor_parallel.autotp_size above 1",
                fix="set it to 0",
            )
        )
    engine_arguments["mpu"] = mpu
    return config if request is None else whole


def _is_pipeline(model: Any) -> bool:
    pipe = sys.modules.get("deepspeed.runtime.pipe.module")
    return pipe is not None and isinstance(model, pipe.PipelineModule)


def _engine_class(model: Any, engine_arguments: dict[str, Any]) -> type[DeepSpeedEngine]:
    """The engine for a kind of model; a pipeline brings its own `mpu`.

    Raises:
        AssertionError: an `mpu` was given with a pipeline.
    """
    if not _is_pipeline(model):
        return DeepSpeedEngine
    from .pipe.engine import PipelineEngine

    if engine_arguments["mpu"] is not None:
        raise AssertionError(
            explain(
                "mpu must be None with pipeline parallelism",
                got=repr(engine_arguments["mpu"]),
                fix="leave mpu out: the PipelineModule has its own",
            )
        )
    engine_arguments["mpu"] = model.mpu()
    return PipelineEngine


def _hybrid_class(engine_class: type[DeepSpeedEngine]) -> type[DeepSpeedEngine]:
    from .hybrid_engine import DeepSpeedHybridEngine

    if engine_class is not DeepSpeedEngine:
        raise DeepSpeedConfigError(
            explain(
                "a pipeline cannot generate between training steps",
                got="a PipelineModule with hybrid_engine.enabled",
                fix="set it to false",
            )
        )
    return DeepSpeedHybridEngine


def find_config(args: Any, config: Any) -> Any:
    """The one configuration among `args.deepspeed_config`, its deprecated twin, and `config`.

    Raises:
        AssertionError: none, or two.
    """
    from_args = None
    if args is not None and not isinstance(args, dict):
        old = getattr(args, "deepscale_config", None)
        if old is not None:
            logger.warning("--deepscale_config is deprecated, please use --deepspeed_config")
            if getattr(args, "deepspeed_config", None) is not None:
                raise AssertionError(
                    explain(
                        "two configurations were given",
                        got="--deepscale_config and --deepspeed_config",
                        expected="--deepspeed_config alone",
                    )
                )
            args.deepspeed_config, args.deepscale_config = old, None
        from_args = getattr(args, "deepspeed_config", None)
    if from_args is not None and config is not None:
        raise AssertionError(
            explain(
                "two configurations were given",
                got="args.deepspeed_config (--deepspeed_config) and config=",
                expected="one of them",
                fix="drop --deepspeed_config from the command line, or config= from the call",
            )
        )
    found = from_args if config is None else config
    if found is None:
        raise AssertionError(
            explain(
                "DeepSpeed requires --deepspeed_config to specify configuration file",
                got="no configuration",
                expected="config= in the call, or --deepspeed_config on the command line",
            )
        )
    return found
