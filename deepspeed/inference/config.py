# SPDX-License-Identifier: Apache-2.0
"""The configuration of ``init_inference``, and the quantisation sections that training shares with it."""

from __future__ import annotations

import importlib.util
from enum import Enum
from typing import Any

import torch
from pydantic import Field, field_validator

from ..runtime.config_utils import DeepSpeedConfigModel, DtypeEnum, deprecated
from ..runtime.zero.config import DeepSpeedZeroConfig


class MoETypeEnum(str, Enum):
    """Kinds of MoE layer."""

    residual = "residual"
    """A dense layer beside the experts."""
    standard = "standard"
    """Experts only."""


class QuantTypeEnum(str, Enum):
    """Kinds of quantisation."""

    asym = "asymmetric"
    """With a zero point."""
    sym = "symmetric"
    """Around zero."""


class DeepSpeedTPConfig(DeepSpeedConfigModel):
    """``tensor_parallel`` (or ``tp``)."""

    enabled: bool = Field(default=True, description="Split layers over ranks.")
    tp_size: int = Field(default=1, description="Ranks of the tensor-parallel group.")
    tp_grain_size: int = Field(default=64, description="Split dimensions at multiples of this.")
    mpu: object = Field(default=None, description="Object that knows the model-parallel groups.")
    tp_group: object = Field(default=None, description="Process group to use.")


class DeepSpeedMoEConfig(DeepSpeedConfigModel):
    """``moe``."""

    enabled: bool = Field(default=True, description="Treat MoE layers.")
    ep_size: int = Field(default=1, description="Ranks over which experts are spread.")
    moe_experts: list[int] = Field(
        default_factory=lambda: [1], alias="num_experts", description="Experts of each MoE layer."
    )
    type: MoETypeEnum = Field(default=MoETypeEnum.standard, description="standard or residual.")
    ep_mp_group: object = Field(default=None, description="Group of expert and model parallelism.")
    ep_group: object = Field(
        default=None, alias="expert_group", description="Group of the experts."
    )

    @field_validator("moe_experts", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value


class BaseQuantConfig(DeepSpeedConfigModel):
    """What weight and activation quantisation share."""

    enabled: bool = Field(default=True, description="Quantise.")
    num_bits: int = Field(default=8, description="Bits of a value.")
    q_type: QuantTypeEnum = Field(default=QuantTypeEnum.sym, description="symmetric or asymmetric.")
    q_groups: int = Field(default=1, description="Groups with their own scale.")


class WeightQuantConfig(BaseQuantConfig):
    """``quant.weight``, and ``weight_quantization`` of a training configuration."""

    quantized_initialization: dict[str, Any] = Field(
        default_factory=dict, description="num_bits, group_size, group_dim, symmetric; at init."
    )
    post_init_quant: dict[str, Any] = Field(
        default_factory=dict, description="The same by module name, after init."
    )


class ActivationQuantConfig(BaseQuantConfig):
    """``quant.activation``."""


class QKVQuantConfig(DeepSpeedConfigModel):
    """``quant.qkv``."""

    enabled: bool = Field(default=True, description="Quantise the attention's input products.")


class QuantizationConfig(DeepSpeedConfigModel):
    """``quant``."""

    enabled: bool = Field(default=True, description="Quantise.")
    activation: ActivationQuantConfig = Field(
        default_factory=ActivationQuantConfig, description="Activations."
    )
    weight: WeightQuantConfig = Field(default_factory=WeightQuantConfig, description="Weights.")
    qkv: QKVQuantConfig = Field(default_factory=QKVQuantConfig, description="Attention inputs.")


class InferenceCheckpointConfig(DeepSpeedConfigModel):
    """``checkpoint_config`` (or ``ckpt_config``)."""

    checkpoint_dir: str | None = Field(default=None, description="Folder of the checkpoint.")
    save_mp_checkpoint_path: str | None = Field(
        default=None, description="Save split weights there."
    )
    base_dir: str | None = Field(default=None, description="Folder that relative paths start from.")


class DeepSpeedInferenceConfig(DeepSpeedConfigModel):
    """Everything that ``init_inference`` takes.

    Raises:
        pydantic.ValidationError: an unknown key, a value that does not fit, ``use_triton`` without triton.
    """

    replace_with_kernel_inject: bool = Field(
        default=False, alias="kernel_inject", description="Replace layers by fused ones."
    )
    dtype: torch.dtype = Field(default=torch.float16, description="Dtype of the model.")
    tensor_parallel: DeepSpeedTPConfig = Field(
        default_factory=DeepSpeedTPConfig, alias="tp", description="Tensor parallelism."
    )
    enable_cuda_graph: bool = Field(
        default=False, description="Capture the forward pass once, replay it."
    )
    use_triton: bool = Field(default=False, description="Use Triton kernels.")
    triton_autotune: bool = Field(default=False, description="Tune them at start.")
    zero: DeepSpeedZeroConfig = Field(
        default_factory=DeepSpeedZeroConfig, description="ZeRO settings of a sharded model."
    )
    triangular_masking: bool = Field(default=True, alias="tm", description="Causal attention.")
    moe: DeepSpeedMoEConfig = Field(
        default_factory=DeepSpeedMoEConfig, description="MoE layers; a bool sets `enabled`."
    )
    keep_module_on_host: bool = Field(default=False, description="Leave the model in host memory.")
    quant: QuantizationConfig = Field(
        default_factory=QuantizationConfig, description="Quantisation."
    )
    checkpoint: str | dict[str, Any] | None = Field(
        default=None, description="Checkpoint, or its JSON."
    )
    base_dir: str = Field(default="", description="Folder that checkpoint paths start from.")
    set_empty_params: bool = Field(
        default=False, description="Build the model without its weights."
    )
    save_mp_checkpoint_path: str | None = Field(
        default=None, description="Save split weights there."
    )
    checkpoint_config: InferenceCheckpointConfig = Field(
        default_factory=InferenceCheckpointConfig,
        alias="ckpt_config",
        description="Where weights come from and go to.",
    )
    return_tuple: bool = Field(default=True, description="Layers return tuples.")
    training_mp_size: int = Field(
        default=1, description="Model-parallel ranks that saved the checkpoint."
    )
    replace_method: str = Field(
        default="auto",
        description="Deprecated, without effect.",
        json_schema_extra=deprecated(message="and has no effect; remove it from the call"),
    )
    injection_policy: dict[Any, Any] | None = Field(
        default=None,
        alias="injection_dict",
        description="Layer class -> names of its last products.",
    )
    injection_policy_tuple: tuple[Any, ...] | None = Field(
        default=None, description="Names of layers whose results are summed over ranks."
    )
    config: dict[str, Any] | None = Field(
        default=None, alias="args", description="Legacy settings."
    )
    max_out_tokens: int = Field(
        default=1024,
        gt=0,
        alias="max_tokens",
        description="Longest prompt and answer together, in tokens.",
    )
    min_out_tokens: int = Field(
        default=1,
        gt=0,
        alias="min_tokens",
        description="Room that must be left for them, in tokens.",
    )
    transposed_mode: bool = Field(default=False, description="Weights are stored transposed.")
    mp_size: int = Field(
        default=1,
        description="Deprecated: tensor_parallel.tp_size.",
        json_schema_extra=deprecated("tensor_parallel.tp_size"),
    )
    mpu: object = Field(
        default=None,
        description="Deprecated: tensor_parallel.mpu.",
        json_schema_extra=deprecated("tensor_parallel.mpu"),
    )
    ep_size: int = Field(
        default=1,
        description="Deprecated: moe.ep_size.",
        json_schema_extra=deprecated("moe.ep_size"),
    )
    ep_group: object = Field(
        default=None,
        alias="expert_group",
        description="Deprecated: moe.ep_group.",
        json_schema_extra=deprecated("moe.ep_group"),
    )
    ep_mp_group: object = Field(
        default=None,
        alias="expert_mp_group",
        description="Deprecated: moe.ep_mp_group.",
        json_schema_extra=deprecated("moe.ep_mp_group"),
    )
    moe_experts: list[int] = Field(
        default_factory=lambda: [1],
        description="Deprecated: moe.moe_experts.",
        json_schema_extra=deprecated("moe.moe_experts"),
    )
    moe_type: MoETypeEnum = Field(
        default=MoETypeEnum.standard,
        description="Deprecated: moe.type.",
        json_schema_extra=deprecated("moe.type"),
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _as_dtype(cls, value: Any) -> torch.dtype:
        return DtypeEnum.parse(value, "dtype")

    @field_validator("moe", mode="before")
    @classmethod
    def _moe_switch(cls, value: Any) -> Any:
        return DeepSpeedMoEConfig(enabled=value) if isinstance(value, bool) else value

    @field_validator("use_triton")
    @classmethod
    def _has_triton(cls, value: bool) -> bool:
        if value and importlib.util.find_spec("triton") is None:
            raise ValueError(
                "use_triton is set but triton is not installed; install it or unset it"
            )
        return value
