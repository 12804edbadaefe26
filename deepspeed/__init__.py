# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's public doors.

Every name but the functions below is looked up on first use (PEP 562), so the import itself costs almost nothing, and
a leaf module may import `deepspeed.comm` without running what stands above it.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING, Any

from deepspeed.utils.lazy import lazy_exports

from .constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from .git_version_info import git_branch, git_hash, version

if TYPE_CHECKING:
    import torch

__version__ = version
__version_major__, __version_minor__, __version_patch__ = (
    int(x) for x in version.split("+")[0].split(".")[:3]
)
__git_hash__, __git_branch__ = git_hash, git_branch

ADAM_OPTIMIZER = "adam"
LAMB_OPTIMIZER = "lamb"
MUON_OPTIMIZER = "muon"

# What scripts reach as `deepspeed.dist`; None until `initialize` has run.
dist: Any = None

# The last request of `tp_model_init`, until `initialize` has followed it.
_TP_MODEL_INIT_ARGS: Any = None

_NAMES = {
    ".accelerator": ["*", "get_accelerator"],
    ".autotuning": ["*"],
    ".checkpoint": ["*"],
    ".comm": ["*"],
    ".comm.comm": ["init_distributed"],
    ".compression": ["*"],
    ".elasticity": ["*"],
    ".launcher": ["*"],
    ".linear": ["*"],
    ".moe": ["*"],
    ".module_inject": ["*", "replace_transformer_layer", "revert_transformer_layer"],
    ".module_inject.tp_layer": ["set_autotp_mode"],
    ".monitor": ["*"],
    ".ops": ["*"],
    ".ops.transformer": ["DeepSpeedTransformerConfig", "DeepSpeedTransformerLayer"],
    ".profiling": ["*"],
    ".runtime": ["*"],
    ".runtime.base_optimizer": ["DeepSpeedOptimizer", "ZeROOptimizer"],
    ".runtime.compiler": ["is_compile_supported"],
    ".runtime.config": ["DeepSpeedConfig", "DeepSpeedConfigError"],
    ".runtime.dataloader": ["DeepSpeedDataLoader"],
    ".pipe": ["*"],
    ".sequence": ["*"],
    ".runtime.engine": ["DeepSpeedEngine"],
    ".runtime.hybrid_engine": ["DeepSpeedHybridEngine"],
    ".runtime.pipe.engine": ["PipelineEngine"],
    ".runtime.pipe.module": ["PipelineModule"],
    ".runtime.lr_schedules": ["add_tuning_arguments"],
    ".runtime.optimizers": [
        "DeepSpeedOptimizerCallable",
        "DeepSpeedSchedulerCallable",
        "set_optimizer_flags",
    ],
    ".inference": ["*"],
    ".inference.config": ["DeepSpeedInferenceConfig"],
    ".inference.engine": ["InferenceEngine"],
    ".utils": ["*"],
    ".utils.init_on_device": ["OnDevice"],
    ".utils.logging": ["log_dist", "logger"],
}

# Modules that are reached by a shorter name than their own.
_ALIASES = {
    "checkpointing": "deepspeed.runtime.activation_checkpointing.checkpointing",
    "domino": "deepspeed.runtime.domino",
    "zero": "deepspeed.runtime.zero",
}

_lazy, _listing, __all__ = lazy_exports(__name__, _NAMES)
__dir__ = _listing


def __getattr__(name: str) -> Any:
    if name == "HAS_TRITON":
        from importlib.util import find_spec

        return find_spec("triton") is not None
    if name in _ALIASES:
        return import_module(_ALIASES[name])
    return _lazy(name)


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: tuple[int, int] | None = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Wrap a model for training.

    Args:
        args: namespace or dict that may carry `deepspeed_config` and `local_rank`.
        model: module; it is cast, moved and, by ZeRO, re-housed in place.
        optimizer, lr_scheduler: object, or callable (from parameters, from the optimizer); win over the configuration's.
        model_parameters: parameters or param groups for an optimizer made here; None is all of the model's.
        training_data, collate_fn: torch dataset for the third result, and what makes its batches.
        distributed_port: port of the process group, where one has to be made.
        mpu: object that knows the caller's own model- and data-parallel groups.
        dist_init_required: whether to make the process group; None does so where there is none.
        config: dict, path of a JSON or HJSON file, or its text in URL-safe base64; `config_params` is its older name.
        mesh_param: `(data ranks, sequence ranks)`.

    Returns:
        `(engine, wrapped optimizer, dataloader, lr_scheduler)`; what does not exist is None.

    Raises:
        AssertionError: no model, no configuration, or two of them.
        DeepSpeedConfigError: the configuration asks for something that is not built.

    Example:
        >>> import torch, deepspeed
        >>> config = {"train_batch_size": 4, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}
        >>> engine, *_ = deepspeed.initialize(model=torch.nn.Linear(8, 8), config=config)
    """
    global dist
    from deepspeed import comm as dist
    from deepspeed.runtime import initialize as door

    return door.initialize(
        args,
        model,
        config=config if config is not None else config_params,
        distributed_port=distributed_port,
        mesh_param=mesh_param,
        tp_request=_take_tp_request(),
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
    )


def init_inference(model: torch.nn.Module, config: Any = None, **kwargs: Any) -> Any:
    """Wrap a model for inference: cast, moved, filled from a checkpoint, its decoding fused where that is possible.

    Args:
        model: any module; `generate` comes with models of transformers.
        config: dict, or path of a JSON file, with the fields of `DeepSpeedInferenceConfig`.
        kwargs: the same fields, as words.

    Returns:
        An `InferenceEngine`.

    Raises:
        ValueError: a field is given twice with different values, or weights are missing.
        pydantic.ValidationError: an unknown field, or a value that does not fit.
        DeepSpeedConfigError: something that is not built, such as `use_triton`.

    Example:
        >>> import torch, deepspeed
        >>> engine = deepspeed.init_inference(torch.nn.Linear(8, 8), dtype=torch.float32)
    """
    global dist
    from deepspeed import comm as dist
    from deepspeed.inference.engine import InferenceEngine, merge

    return InferenceEngine(model, merge(config, kwargs))


def tp_model_init(
    model: torch.nn.Module, tp_size: int, dtype: Any, config: Any = None, **kwargs: Any
) -> Any:
    """Note that a model is to be divided over tensor-parallel ranks; `initialize` does it (AutoTP).

    Args:
        model: the model, which is returned.
        tp_size: number of ranks that share each layer.
        dtype: the model's dtype, as in the configuration.
        config: accepted; `initialize` reads it.
        kwargs: `tp_group`, the process group of these ranks.

    Raises:
        ValueError: an impossible size, or one that is not the group's.
        TypeError: another keyword argument.
    """
    global _TP_MODEL_INIT_ARGS
    from deepspeed.runtime.tensor_parallel import request

    tp_group = kwargs.pop("tp_group", None)
    if kwargs:
        raise TypeError(f"tp_model_init got unexpected keyword arguments: {', '.join(kwargs)}")
    _TP_MODEL_INIT_ARGS = request.record(model, tp_size, dtype, tp_group)
    return model


def _take_tp_request() -> Any:
    """The last request of `tp_model_init`, which no later `initialize` gets."""
    global _TP_MODEL_INIT_ARGS
    request, _TP_MODEL_INIT_ARGS = _TP_MODEL_INIT_ARGS, None
    return request


def default_inference_config() -> dict[str, Any]:
    """The inference configuration with every field at its default, as a dict."""
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    return DeepSpeedInferenceConfig().model_dump()


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed`, `--deepspeed_config` and their deprecated twins to a script's parser."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument(
        "--deepspeed",
        default=False,
        action="store_true",
        help="Enable DeepSpeed (helper flag for user code, no impact on DeepSpeed itself)",
    )
    group.add_argument(
        "--deepspeed_config", default=None, type=str, help="DeepSpeed json configuration file."
    )
    group.add_argument(
        "--deepscale", default=False, action="store_true", help="Deprecated name of --deepspeed"
    )
    group.add_argument(
        "--deepscale_config", default=None, type=str, help="Deprecated name of --deepspeed_config"
    )
    return parser
