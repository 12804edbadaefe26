# SPDX-License-Identifier: Apache-2.0
"""Sections of ``zero_optimization`` that say where params and optimizer states live."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from pydantic import Field, model_validator

from ..config_utils import DeepSpeedConfigModel, pp_int


class OffloadDeviceEnum(str, Enum):
    """Where offloaded bytes live."""

    none = "none"
    """They stay on the accelerator."""
    cpu = "cpu"
    """Host memory."""
    nvme = "nvme"
    """Files on a fast disk."""


class OffloadStateTypeEnum(str, Enum):
    """Kinds of training state that ``engine.offload_states`` can move."""

    optim_states = "optim_states"
    """Optimizer states such as moments."""
    hp_params = "hp_params"
    """Master weights in high precision."""
    lp_params = "lp_params"
    """Model weights in low precision."""
    lp_grads = "lp_grads"
    """Gradients in low precision."""
    contiguous_grad_buffer = "contiguous_grad_buffer"
    """The buffer in which gradients are gathered for reduction."""


class DeepSpeedZeroOffloadParamConfig(DeepSpeedConfigModel):
    """``offload_param``: where ZeRO-3 keeps the params between uses."""

    device: OffloadDeviceEnum = Field(
        default=OffloadDeviceEnum.none, description="Where params live: none, cpu or nvme."
    )
    nvme_path: Path | None = Field(
        default=None, description="Folder on the disk that holds the params."
    )
    buffer_count: int = Field(
        default=5, ge=0, description="Host buffers for params on the way to disk."
    )
    buffer_size: int = Field(
        default=pp_int(1e8), ge=0, description="Elements in each of those buffers."
    )
    max_in_cpu: int = Field(
        default=pp_int(1e9), ge=0, description="Elements kept in host memory anyway."
    )
    pin_memory: bool = Field(default=True, description="Use page-locked host memory.")


class DeepSpeedZeroOffloadOptimizerConfig(DeepSpeedConfigModel):
    """``offload_optimizer``: where optimizer states live, and hence where the step runs."""

    device: OffloadDeviceEnum = Field(
        default=OffloadDeviceEnum.none,
        description="Where optimizer states live: none, cpu or nvme.",
    )
    nvme_path: Path | None = Field(
        default=None, description="Folder on the disk that holds the states."
    )
    buffer_count: int = Field(
        default=4, ge=0, description="Host buffers for states on the way to disk."
    )
    pin_memory: bool = Field(default=True, description="Use page-locked host memory.")
    pipeline_read: bool = Field(
        default=False, description="Read the next tile while one is stepped."
    )
    pipeline_write: bool = Field(
        default=False, description="Write the last tile while one is stepped."
    )
    fast_init: bool = Field(default=False, description="Quicker initialisation of states on disk.")
    ratio: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Share of the states that is offloaded (ZeRO 1 to 3).",
    )
    super_offload: bool = Field(default=False, description="SuperOffload's schedule (ZeRO 3).")
    cpuadam_cores_perc: float = Field(
        default=0.8,
        ge=0.0,
        le=1.0,
        description="Share of the cores that SuperOffload's Adam may use.",
    )

    @property
    def pipeline(self) -> bool:
        """Whether reading or writing overlaps with stepping."""
        return self.pipeline_read or self.pipeline_write


class ZenFlowConfig(DeepSpeedConfigModel):
    """``zenflow``: offloaded steps that never stall the accelerator."""

    topk_ratio: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description="Share of gradient columns updated at once on the device.",
    )
    select_strategy: str = Field(
        default="auto", description="When to choose columns: auto, step, epoch."
    )
    select_interval: str | int = Field(
        default="auto", description="Steps (or epochs) between choices."
    )
    update_interval: str | int = Field(
        default="auto", description="Steps between updates of the rest."
    )
    overlap_step: bool = Field(
        default=False, description="Overlap the host's step with the next passes."
    )
    offload: bool = Field(
        default=False, description="Keep the chosen columns' states in host memory."
    )
    auto_ratio: float = Field(
        default=0.99,
        ge=0.0,
        le=1.0,
        description="Share of gradient norm that automatic choice covers.",
    )
    full_warm_up_rounds: int = Field(
        default=0, description="Rounds of ordinary steps at the start."
    )
    pt_reserved_cores_perc: float = Field(
        default=0.5, ge=0.0, le=1.0, description="Share of the cores left to PyTorch."
    )
    steps_per_epoch: int | None = Field(default=None, description="Filled in by the engine.")

    @model_validator(mode="after")
    def _known_strategy(self) -> ZenFlowConfig:
        allowed = ("auto", "step", "epoch")
        if self.select_strategy not in allowed:
            raise ValueError(f"select_strategy is one of {allowed}, got {self.select_strategy!r}")
        for key in ("select_interval", "update_interval"):
            value = getattr(self, key)
            if isinstance(value, str) and value != "auto":
                raise ValueError(f"{key} is a whole number or 'auto', got {value!r}")
        return self
