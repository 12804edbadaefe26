# SPDX-License-Identifier: Apache-2.0
"""The half-precision sections ``fp16`` and ``bf16`` (old spelling: ``bfloat16``), and ``torch_autocast``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from .config_utils import DeepSpeedConfigModel, DtypeEnum, PlainSection, section_of

FP16 = "fp16"
BFLOAT16 = "bf16"
BFLOAT16_OLD = "bfloat16"


class DeepSpeedFP16Config(DeepSpeedConfigModel):
    """``fp16``: half-precision training with a loss scale."""

    enabled: bool = Field(default=False, description="Train in float16.")
    auto_cast: bool = Field(
        default=False, description="Cast floating positional inputs to float16."
    )
    loss_scale: float = Field(default=0, description="Fixed loss scale; 0 means dynamic scaling.")
    initial_scale_power: int = Field(
        default=16, description="Dynamic scaling starts at 2 to this power."
    )
    loss_scale_window: int = Field(
        default=1000, description="Clean steps after which a dynamic scale doubles."
    )
    hysteresis: int = Field(
        default=2, description="Overflows tolerated before a dynamic scale halves."
    )
    consecutive_hysteresis: bool = Field(
        default=False,
        description="Refill the hysteresis budget at each clean step, not only at growth.",
    )
    min_loss_scale: int = Field(default=1, description="Floor of a dynamic scale.")
    fp16_master_weights_and_grads: bool = Field(
        default=False, description="Keep master weights and gradients in float16 too (ZeRO 1 to 3)."
    )

    @field_validator("loss_scale", mode="before")
    @classmethod
    def _finite_scale(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"fp16.loss_scale must be a number, not bool; got {value}")
        try:
            scale = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"fp16.loss_scale must be a number; got {value!r}") from None
        if not math.isfinite(scale):
            raise ValueError(f"fp16.loss_scale must be finite; got {value}")
        if scale < 0:
            raise ValueError(f"fp16.loss_scale must be >= 0 (0 scales dynamically); got {value}")
        return value

    @field_validator("loss_scale_window", "min_loss_scale", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            raise ValueError(
                f"fp16.{info.field_name} must be a whole number, not bool; got {value}"
            )
        return value

    @model_validator(mode="after")
    def _usable_dynamic_scale(self) -> DeepSpeedFP16Config:
        if self.enabled and self.loss_scale == 0:
            for key in ("loss_scale_window", "min_loss_scale"):
                if getattr(self, key) <= 0:
                    raise ValueError(
                        f"fp16.{key} must be > 0 while the loss scale is dynamic (loss_scale 0); "
                        f"got {getattr(self, key)}"
                    )
        return self


class DeepSpeedBF16Config(DeepSpeedConfigModel):
    """``bf16``: bfloat16 training, which needs no loss scale."""

    enabled: bool = Field(default=False, description="Train in bfloat16.")
    immediate_grad_update: bool = Field(
        default=False, description="Add each gradient to its fp32 sum as soon as it is there."
    )
    check_grad_overflow: bool = Field(
        default=True, description="Skip steps with non-finite gradients."
    )
    bf16_master_weights_and_grads: bool = Field(
        default=False,
        description="Keep master weights and gradients in bfloat16 too (ZeRO 1 to 3).",
    )
    bf16_optimizer_states: bool = Field(
        default=False,
        description="Keep optimizer states in bfloat16; needs bf16_master_weights_and_grads.",
    )


class TorchAutocastConfig(PlainSection):
    """``torch_autocast``: run forward passes under ``torch.autocast``."""

    section: ClassVar[str] = "torch_autocast"

    enabled: bool = Field(default=False, description="Run the forward pass under torch.autocast.")
    dtype: Any = Field(
        default=None, description="Autocast dtype: bfloat16 or float16; null: the default."
    )
    lower_precision_safe_modules: list[str] | None = Field(
        default=None,
        description="Classes (full names) whose gradients may be reduced in that dtype.",
    )

    @field_validator("dtype")
    @classmethod
    def _as_dtype(cls, value: Any) -> Any:
        return None if value is None else DtypeEnum.parse(value, "torch_autocast.dtype")


def get_float16_config(param_dict: Mapping[str, Any]) -> DeepSpeedFP16Config:
    """Parse section ``fp16`` of a whole configuration."""
    return DeepSpeedFP16Config(**section_of(param_dict, FP16))


def get_bfloat16_config(param_dict: Mapping[str, Any]) -> DeepSpeedBF16Config:
    """Parse section ``bf16``; the old spelling ``bfloat16`` counts only where ``bf16`` is absent."""
    name = BFLOAT16 if param_dict.get(BFLOAT16) is not None else BFLOAT16_OLD
    return DeepSpeedBF16Config(**section_of(param_dict, name))
