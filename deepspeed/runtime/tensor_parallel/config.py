# SPDX-License-Identifier: Apache-2.0
"""The section ``tensor_parallel``: layers split over ranks while training (AutoTP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from ..config_utils import DeepSpeedConfigModel, DtypeEnum, section_of

PRESETS = ("llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3")


class TPConfig(DeepSpeedConfigModel):
    """``tensor_parallel.tensor_parallel`` (or ``tp``): the group."""

    tp_size: int = Field(default=1, description="Ranks of the tensor-parallel group.")
    tp_grain_size: int = Field(default=1, description="Split dimensions at multiples of this.")
    mpu: object = Field(default=None, description="Object that knows the model-parallel groups.")
    tp_group: object = Field(default=None, description="Process group to use.")


class TPTrainingConfig(DeepSpeedConfigModel):
    """``tensor_parallel``."""

    dtype: torch.dtype = Field(default=torch.float16, description="Dtype of the split model.")
    autotp_size: int = Field(
        default=0, description="Ranks over which layers are split; 0 and 1 are off."
    )
    tp_overlap_comm: bool = Field(
        default=False, description="Overlap communication with the products."
    )
    vocab_parallel_lm_head: bool | None = Field(
        default=None, description="Split the LM head by words."
    )
    vocab_parallel_ce_backend: Literal["torch", "liger"] = Field(
        default="torch", description="Who computes the loss of a split LM head."
    )
    tensor_parallel: TPConfig = Field(
        default_factory=TPConfig, alias="tp", description="The tensor-parallel group."
    )
    injection_policy_tuple: tuple[Any, ...] | None = Field(
        default=None, description="Names of layers whose results are summed over ranks."
    )
    partition_config: dict[str, Any] | None = Field(
        default=None,
        description="use_default_specs, strict_mode and layer_specs: how to split which layer.",
    )
    preset_model: str | None = Field(
        default=None, description=f"Ready-made layer_specs: {', '.join(PRESETS)}."
    )
    keep_module_on_host: bool = Field(
        default=False, description="Leave the split model in host memory."
    )
    replace_with_kernel_inject: bool = Field(
        default=False, alias="kernel_inject", description="Replace layers by fused ones."
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _as_dtype(cls, value: Any) -> torch.dtype:
        return DtypeEnum.parse(value, "tensor_parallel.dtype")

    @field_validator("preset_model")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value.lower() not in PRESETS:
            raise ValueError(f"preset_model is one of {', '.join(PRESETS)}; got {value!r}")
        return value

    @model_validator(mode="after")
    def _one_size(self) -> TPTrainingConfig:
        size = self.tensor_parallel.tp_size
        if self.autotp_size > 1 and size not in (1, self.autotp_size):
            raise ValueError(
                f"tensor_parallel.tp.tp_size is 1 or the autotp_size ({self.autotp_size}), got {size}"
            )
        return self


def get_tensor_parallel_config(ds_config: Mapping[str, Any]) -> TPTrainingConfig:
    """Parse section ``tensor_parallel`` of a whole configuration."""
    return TPTrainingConfig(**section_of(ds_config, "tensor_parallel"))


def _get_hf_tp_plan(model: Any) -> dict[str, str] | None:
    """The tensor-parallel plan of a model of transformers: its configuration's, and what its class adds.

    transformers repeats the configuration's entries in the model's plan under longer names; those are left out.
    """
    config = getattr(model, "config", None)
    plan: dict[str, str] = dict(getattr(config, "base_model_tp_plan", None) or {})
    known = tuple(plan)
    for own in (getattr(model, "_tp_plan", None), getattr(type(model), "_tp_plan", None)):
        for name, style in (own or {}).items() if isinstance(own, Mapping) else ():
            if not any(name == other or name.endswith(f".{other}") for other in known):
                plan.setdefault(name, style)
    return plan or None
