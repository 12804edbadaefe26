# SPDX-License-Identifier: Apache-2.0
"""The section ``zero_optimization``: what is sharded, where it lives, how it is moved."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ...utils.errors import explain
from ...utils.logging import logger
from ..config_errors import ConfigTypeError
from ..config_utils import DeepSpeedConfigModel, deprecated, pp_int
from .leaf_module_config import DeepSpeedZeroLeafModuleConfig
from .offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
    OffloadDeviceEnum,
    ZenFlowConfig,
)

ZERO_OPTIMIZATION = "zero_optimization"


class ZeroStageEnum(int, Enum):
    """What each ZeRO stage shards over the data-parallel ranks."""

    disabled = 0
    """Nothing."""
    optimizer_states = 1
    """Optimizer states and master weights."""
    gradients = 2
    """The gradients as well."""
    weights = 3
    """The params as well."""
    max_stage = 3
    """The highest stage there is."""


def _on_cpu(section: type[DeepSpeedConfigModel]) -> Any:
    return lambda wanted: section(device=OffloadDeviceEnum.cpu) if wanted else None


class DeepSpeedZeroConfig(DeepSpeedConfigModel):
    """``zero_optimization`` in its dictionary form."""

    stage: ZeroStageEnum = Field(
        default=ZeroStageEnum.disabled, description="0 off; 1 states; 2 + gradients; 3 + params."
    )
    contiguous_gradients: bool = Field(
        default=True,
        description="Copy gradients to one buffer as they come, against fragmentation.",
    )
    reduce_scatter: bool = Field(
        default=True, description="Reduce to owners instead of to every rank."
    )
    reduce_bucket_size: int = Field(
        default=pp_int(5e8),
        ge=0,
        description="Elements reduced at once; bounds the buffers' memory.",
    )
    use_multi_rank_bucket_allreduce: bool = Field(
        default=True, description="Put gradients of several owners in one bucket (stages 1, 2)."
    )
    allgather_partitions: bool = Field(
        default=True, description="Publish updated params by all-gather rather than by broadcasts."
    )
    allgather_bucket_size: int = Field(
        default=pp_int(5e8), ge=0, description="Elements gathered at once; should be even."
    )
    overlap_comm: bool | None = Field(
        default=None,
        description="Reduce while backward runs. Default: true at stage 3, else false.",
    )
    compute_grad_norm: bool = Field(
        default=True, description="Compute the global gradient norm even when nothing clips by it."
    )
    load_from_fp32_weights: bool = Field(
        default=True, description="Initialise master weights from a checkpoint's fp32 shards."
    )
    elastic_checkpoint: bool = Field(
        default=False, description="Legacy: checkpoints that load at another world size."
    )
    offload_param: DeepSpeedZeroOffloadParamConfig | None = Field(
        default=None, description="Where params live (stage 3)."
    )
    offload_optimizer: DeepSpeedZeroOffloadOptimizerConfig | None = Field(
        default=None, description="Where optimizer states live."
    )
    zenflow: ZenFlowConfig | None = Field(default=None, description="Stall-free offloaded steps.")
    sub_group_size: int = Field(
        default=pp_int(1e9), ge=0, description="Elements stepped as one tile (stage 3)."
    )
    cpu_offload_param: bool | None = Field(
        default=None,
        description="Deprecated: offload_param with device cpu.",
        json_schema_extra=deprecated(
            "offload_param", convert=_on_cpu(DeepSpeedZeroOffloadParamConfig)
        ),
    )
    cpu_offload_use_pin_memory: bool | None = Field(
        default=None,
        description="Deprecated and ignored: pin_memory of the offload sections.",
        json_schema_extra=deprecated("offload_param or offload_optimizer", set_new=False),
    )
    cpu_offload: bool | None = Field(
        default=None,
        description="Deprecated: offload_optimizer with device cpu.",
        json_schema_extra=deprecated(
            "offload_optimizer", convert=_on_cpu(DeepSpeedZeroOffloadOptimizerConfig)
        ),
    )
    prefetch_bucket_size: int = Field(
        default=pp_int(5e7),
        ge=0,
        alias="stage3_prefetch_bucket_size",
        description="Elements fetched ahead of use (stage 3).",
    )
    param_persistence_threshold: int = Field(
        default=pp_int(1e5),
        ge=0,
        alias="stage3_param_persistence_threshold",
        description="Params smaller than this stay whole on every rank (stage 3).",
    )
    model_persistence_threshold: int = Field(
        default=sys.maxsize,
        ge=0,
        alias="stage3_model_persistence_threshold",
        description="At most so many elements stay whole (stage 3).",
    )
    max_live_parameters: int = Field(
        default=pp_int(1e9),
        ge=0,
        alias="stage3_max_live_parameters",
        description="At most so many elements are gathered at a time (stage 3).",
    )
    max_reuse_distance: int = Field(
        default=pp_int(1e9),
        ge=0,
        alias="stage3_max_reuse_distance",
        description="Keep a param gathered if it is used again within so many elements (stage 3).",
    )
    gather_16bit_weights_on_model_save: bool = Field(
        default=False,
        alias="stage3_gather_16bit_weights_on_model_save",
        description="Let save_16bit_model gather the whole model (stage 3).",
    )
    module_granularity_threshold: int = Field(
        default=0,
        alias="stage3_module_granularity_threshold",
        description="Modules finer than this many elements are fetched as one (stage 3).",
    )
    use_all_reduce_for_fetch_params: bool = Field(
        default=False,
        alias="stage3_use_all_reduce_for_fetch_params",
        description="Fetch params by all-reduce instead of all-gather (stage 3).",
    )
    allgather_sequential: bool = Field(
        default=False,
        alias="stage3_allgather_sequential",
        description="Gather params one after another; sets prefetch_bucket_size to 1 (stage 3).",
    )
    stage3_gather_fp16_weights_on_model_save: bool = Field(
        default=False,
        description="Deprecated: gather_16bit_weights_on_model_save.",
        json_schema_extra=deprecated("gather_16bit_weights_on_model_save"),
    )
    ignore_unused_parameters: bool = Field(
        default=True, description="Accept params that got no gradient in a backward pass."
    )
    legacy_stage1: bool = Field(
        default=False, description="The first stage 1; gone, true is refused."
    )
    round_robin_gradients: bool = Field(
        default=False,
        description="Deal params to ranks in turn so that offload copies run in parallel.",
    )
    parameter_alignment: bool = Field(
        default=False, description="Start each param at an aligned place in its flat buffer."
    )
    zero_hpz_partition_size: int = Field(
        default=1,
        ge=0,
        description="ZeRO++ hpZ: ranks of the second, closer shard group (stage 3).",
    )
    zero_quantized_weights: bool = Field(
        default=False, description="ZeRO++ qwZ: gather params as int8 (stage 3)."
    )
    zero_quantized_nontrainable_weights: bool = Field(
        default=False, description="Store frozen params as int8 (stage 3)."
    )
    zero_quantized_gradients: bool = Field(
        default=False, description="ZeRO++ qgZ: reduce gradients as int4 (stage 3)."
    )
    zeropp_loco_param: dict[str, Any] | None = Field(
        default=None, description="Error feedback of qgZ: err_beta and reset_T."
    )
    mics_shard_size: int = Field(
        default=-1, description="MiCS: ranks per shard group; -1 means off."
    )
    mics_hierarchical_params_gather: bool = Field(
        default=False, description="MiCS: gather within nodes first."
    )
    memory_efficient_linear: bool = Field(
        default=True,
        description="Let zero.Init use a Linear that keeps no gathered weight (stage 3).",
    )
    pipeline_loading_checkpoint: bool = Field(
        default=False, description="Load a checkpoint rank by rank (stage 3)."
    )
    override_module_apply: bool = Field(
        default=True, description="Let zero.Init gather params inside Module.apply (stage 3)."
    )
    log_trace_cache_warnings: bool = Field(
        default=False, description="Warn when the order of module uses changes (stage 3)."
    )
    enable_sanity_checks: bool = Field(
        default=False,
        description="Check that gathered params were edited alike on all ranks (stage 3).",
    )
    save_muon_momentum_buffer_in_memory: bool = Field(
        default=False, description="Keep Muon's momentum in memory rather than on disk (stage 3)."
    )
    leaf_module: DeepSpeedZeroLeafModuleConfig = Field(
        default_factory=DeepSpeedZeroLeafModuleConfig,
        description="Modules whose params are fetched all at once (stage 3).",
    )

    @field_validator("prefetch_bucket_size", mode="before")
    @classmethod
    def _whole_elements(cls, value: Any) -> Any:
        # transformers up to 4.44 writes 0.9 * hidden_size * hidden_size for "auto", fraction and all.
        return int(value) if isinstance(value, float) and math.isfinite(value) else value

    @field_validator("overlap_comm")
    @classmethod
    def _overlap_by_stage(cls, value: bool | None, info: Any) -> bool:
        return info.data.get("stage") == ZeroStageEnum.weights if value is None else value

    @field_validator("leaf_module", mode="before")
    @classmethod
    def _leaf_module_or_default(cls, value: Any) -> Any:
        return DeepSpeedZeroLeafModuleConfig() if value is None else value

    @model_validator(mode="after")
    def _partial_offload_needs_shards(self) -> DeepSpeedZeroConfig:
        offload = self.offload_optimizer
        if offload is not None and offload.ratio < 1.0 and self.stage == ZeroStageEnum.disabled:
            raise AssertionError(
                explain(
                    "offload_optimizer.ratio below 1 needs ZeRO stage 1, 2 or 3",
                    got=f"stage {int(self.stage)} and ratio {offload.ratio}",
                    fix="Set 'zero_optimization.stage', or leave the ratio at 1.0.",
                )
            )
        return self

    @field_validator("elastic_checkpoint")
    @classmethod
    def _no_elastic_form_at_stage_3(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("stage") == ZeroStageEnum.weights:
            logger.warning(
                "zero_optimization.elastic_checkpoint: elastic checkpointing is deprecated and has no effect at "
                "stage 3; every checkpoint loads on any number of ranks."
            )
        return value


def read_zero_config(value: Any, allgather_size: int | None = None) -> DeepSpeedZeroConfig:
    """Build the model from what stands under ``zero_optimization``.

    Args:
        value: None (absent), a dictionary, or the deprecated bool (true is stage 1, false is stage 0).
        allgather_size: bucket size in elements of the old form; used only with a bool.

    Raises:
        pydantic.ValidationError: an unknown key or a value that does not fit.
        TypeError: (as ``ConfigTypeError``) neither a dictionary nor a bool.
    """
    if isinstance(value, DeepSpeedZeroConfig):
        return value
    if isinstance(value, bool):
        logger.warning(
            "'zero_optimization' as a bool is deprecated; write "
            f'"zero_optimization": {{"stage": {int(value)}}} instead.'
        )
        value = {"stage": int(value)}
        if allgather_size is not None:
            value["allgather_bucket_size"] = allgather_size
    if value is not None and not isinstance(value, Mapping):
        raise ConfigTypeError(
            explain(
                "config section 'zero_optimization' has the wrong type",
                got=f"{value!r} ({type(value).__name__})",
                expected='a JSON object such as {"stage": 2}',
            )
        )
    return DeepSpeedZeroConfig(**(value or {}))


def get_zero_config(param_dict: Mapping[str, Any]) -> DeepSpeedZeroConfig:
    """Parse ``zero_optimization`` of a whole configuration, in either form."""
    return read_zero_config(param_dict.get(ZERO_OPTIMIZATION), param_dict.get("allgather_size"))
