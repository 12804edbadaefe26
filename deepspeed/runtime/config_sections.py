# SPDX-License-Identifier: Apache-2.0
"""The small sections that have no package of their own: optimizer, scheduler, dtypes, pipeline and legacy ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ..utils.errors import explain
from .config_errors import ConfigKeyError
from .config_utils import (
    DeepSpeedConfigModel,
    DtypeEnum,
    OpenSection,
    PlainSection,
    section_of,
)
from .constants import DEEPSPEED_OPTIMIZERS


class OptimizerSection(PlainSection):
    """``optimizer``: the optimizer that the engine builds when the caller brings none."""

    section: ClassVar[str] = "optimizer"

    type: str | None = Field(
        default=None, description="Our name in any case, or a torch.optim class."
    )
    params: dict[str, Any] | None = Field(default=None, description="Arguments of its constructor.")
    legacy_fusion: bool = Field(
        default=False, description="Legacy fused wrapper for fp16 at stage 0."
    )

    @property
    def name(self) -> str | None:
        """The type, in lower case where it is one of ours."""
        if self.type is not None and self.type.lower() in DEEPSPEED_OPTIMIZERS:
            return self.type.lower()
        return self.type


class SchedulerSection(PlainSection):
    """``scheduler``: the learning-rate scheduler, when the caller brings none."""

    section: ClassVar[str] = "scheduler"

    type: str | None = Field(
        default=None, description="Our scheduler or torch.optim.lr_scheduler class."
    )
    params: dict[str, Any] | None = Field(default=None, description="Arguments of its constructor.")


class DataTypesSection(PlainSection):
    """``data_types``: dtypes that differ from the mode's."""

    section: ClassVar[str] = "data_types"

    grad_accum_dtype: Any = Field(
        default=None, description="Dtype of summed gradients; null: the model's."
    )
    param_dtype: Any = Field(
        default=None, description="Dtype of params; must agree with fp16 or bf16."
    )
    buffer_dtype: Any = Field(
        default=None, description="Dtype of floating buffers; null: left alone."
    )
    keep_in_fp32_modules: Any = Field(
        default="auto", description="Modules left in fp32: names, or auto for the model's own list."
    )

    @field_validator("grad_accum_dtype", "param_dtype", "buffer_dtype")
    @classmethod
    def _as_dtype(cls, value: Any, info: Any) -> Any:
        return None if value is None else DtypeEnum.parse(value, f"data_types.{info.field_name}")


class HybridEngineConfig(DeepSpeedConfigModel):
    """``hybrid_engine``: one model that trains and generates in turn."""

    enabled: bool = Field(default=False, description="Use the hybrid engine.")
    max_out_tokens: int = Field(
        default=512, gt=0, description="Longest prompt and answer, in tokens."
    )
    inference_tp_size: int = Field(default=1, description="Tensor-parallel ranks while generating.")
    release_inference_cache: bool = Field(
        default=False, description="Free the cache after generating."
    )
    pin_parameters: bool = Field(default=True, description="Use page-locked host memory.")
    tp_gather_partition_size: int = Field(default=8, description="Layers gathered at a time.")
    enable_cuda_graph: bool = Field(
        default=False, description="Capture the forward pass once, replay it."
    )


class AmpSection(OpenSection):
    """``amp``: NVIDIA Apex; further keys are arguments of ``amp.initialize``."""

    section: ClassVar[str] = "amp"

    enabled: bool = Field(default=False, description="Use Apex mixed precision.")


class PipelineSection(OpenSection):
    """``pipeline``: settings of the pipeline engine."""

    section: ClassVar[str] = "pipeline"

    stages: int | str = Field(default="auto", description="Number of stages (informative).")
    partition: str = Field(default="best", description="How layers are dealt (informative).")
    seed_layers: bool = Field(default=False, description="Seed each layer's initialisation.")
    activation_checkpoint_interval: int = Field(
        default=0, description="Layers between checkpoints."
    )
    pipe_partitioned: bool = Field(default=True, description="Send activations in shards.")
    grad_partitioned: bool = Field(default=True, description="Send gradients in shards.")
    use_reentrant: bool | None = Field(
        default=None, description="Kind of checkpointing; null is true."
    )


class EigenvalueConfig(PlainSection):
    """``quantize_training.eigenvalue``: curvature that steers quantisation."""

    enabled: bool = Field(default=False, description="Compute eigenvalues; true is refused.")
    verbose: bool = Field(default=False, description="Print them.")
    max_iter: int = Field(default=100, description="Power iterations.")
    tol: float = Field(default=1e-2, description="Relative change at which they stop.")
    stability: float = Field(default=1e-6, description="Added to divisors.")
    gas_boundary_resolution: int = Field(
        default=1, description="Optimizer steps between computations."
    )
    layer_name: str = Field(default="bert.encoder.layer", description="Where the layers are.")
    layer_num: int = Field(default=0, description="How many layers there are.")


class QuantizeTrainingSection(PlainSection):
    """``quantize_training``: only its eigenvalue part is read."""

    section: ClassVar[str] = "quantize_training"

    eigenvalue: EigenvalueConfig = Field(
        default_factory=EigenvalueConfig, description="Curvature that steers quantisation."
    )


class DataStatesConfig(PlainSection):
    """``datastates_ckpt``: any value but false turns the DataStates engine on."""

    enabled: bool = Field(default=False, description="Whether the section is there and not false.")
    config: Any = Field(default=None, description="Settings, passed on as they are.")


_SPARSE_COMMON: dict[str, Any] = {"block": 16, "different_layout_per_head": False}
_SPARSE_GLOBAL: dict[str, Any] = {
    "num_random_blocks": 0,
    "local_window_blocks": [4],
    "global_block_indices": [0],
    "global_block_end_indices": None,
    "attention": "bidirectional",
    "horizontal_global_attention": False,
}
# mode -> the keys that belong to it, with defaults
SPARSE_ATTENTION_MODES: dict[str, dict[str, Any]] = {
    "dense": {"block": 16},
    "fixed": {
        **_SPARSE_COMMON,
        "num_local_blocks": 4,
        "num_global_blocks": 1,
        "attention": "bidirectional",
        "horizontal_global_attention": False,
        "num_different_global_patterns": 1,
    },
    "variable": {**_SPARSE_COMMON, **_SPARSE_GLOBAL},
    "bigbird": {
        **_SPARSE_COMMON,
        "num_random_blocks": 1,
        "num_sliding_window_blocks": 3,
        "num_global_blocks": 1,
    },
    "bslongformer": {
        **_SPARSE_COMMON,
        "num_sliding_window_blocks": 3,
        "global_block_indices": [0],
        "global_block_end_indices": None,
    },
}


def get_sparse_attention(param_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the keys of the chosen sparse-attention mode, or None where the section is absent.

    Raises:
        NotImplementedError: no such mode.
    """
    if param_dict.get("sparse_attention") is None:
        return None
    section = section_of(param_dict, "sparse_attention")
    mode = section.get("mode", "fixed")
    if mode not in SPARSE_ATTENTION_MODES:
        known = ", ".join(SPARSE_ATTENTION_MODES)
        raise NotImplementedError(
            explain("no such sparse_attention.mode", got=repr(mode), expected=known)
        )
    defaults = SPARSE_ATTENTION_MODES[mode]
    return {"mode": mode, **{key: section.get(key, value) for key, value in defaults.items()}}


def get_amp_params(param_dict: Mapping[str, Any]) -> dict[str, Any] | bool:
    """Return Apex's own arguments, or False where section ``amp`` is absent.

    Raises:
        KeyError: (as ``ConfigKeyError``) the section has no 'enabled'.
    """
    if param_dict.get("amp") is None:
        return False
    section = section_of(param_dict, "amp")
    if "enabled" not in section:
        raise ConfigKeyError("section 'amp' lacks 'enabled': set it to true or false.")
    return {key: value for key, value in section.items() if key != "enabled"}


def get_datastates_config(param_dict: Mapping[str, Any]) -> DataStatesConfig:
    """Parse ``datastates_ckpt``: a dictionary or true turns it on."""
    value = param_dict.get("datastates_ckpt")
    on = value is not None and value is not False
    return DataStatesConfig(enabled=on, config=value)


def get_pipeline_config(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return section ``pipeline`` with its defaults and with every further key that was given."""
    return PipelineSection.of(param_dict).model_dump()
