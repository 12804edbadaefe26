# SPDX-License-Identifier: Apache-2.0
"""Sections of the monitors that record a run: TensorBoard, CSV, Weights & Biases, Comet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from ..runtime.config_utils import DeepSpeedConfigModel, section_of


class TensorBoardConfig(DeepSpeedConfigModel):
    """``tensorboard``: event files for TensorBoard."""

    enabled: bool = Field(default=False, description="Write TensorBoard event files.")
    output_path: str = Field(default="", description="Folder; empty means the working folder.")
    job_name: str = Field(default="DeepSpeedJobName", description="Folder of this run inside it.")


class CSVConfig(DeepSpeedConfigModel):
    """``csv_monitor``: one CSV file a metric."""

    enabled: bool = Field(default=False, description="Write CSV files.")
    output_path: str = Field(default="", description="Folder; empty means the working folder.")
    job_name: str = Field(default="DeepSpeedJobName", description="Folder of this run inside it.")


class WandbConfig(DeepSpeedConfigModel):
    """``wandb``: Weights & Biases."""

    enabled: bool = Field(default=False, description="Record with Weights & Biases.")
    group: str | None = Field(default=None, description="Group of runs.")
    team: str | None = Field(default=None, description="Team (entity) that owns the run.")
    project: str = Field(default="deepspeed", description="Project of the run.")


class CometConfig(DeepSpeedConfigModel):
    """``comet``: Comet experiments."""

    enabled: bool = Field(default=False, description="Record with Comet.")
    samples_log_interval: int = Field(default=100, description="Samples between two records.")
    project: str | None = Field(default=None, description="Project of the experiment.")
    workspace: str | None = Field(default=None, description="Workspace of the project.")
    api_key: str | None = Field(
        default=None, description="Key; better given in Comet's own settings."
    )
    experiment_name: str | None = Field(default=None, description="Name of the experiment.")
    experiment_key: str | None = Field(default=None, description="Key of an existing experiment.")
    online: bool | None = Field(
        default=None, description="Send at once (true) or keep for later (false)."
    )
    mode: str | None = Field(
        default=None, description="get, create or get_or_create the experiment."
    )

    @model_validator(mode="after")
    def _known_mode(self) -> CometConfig:
        allowed = (None, "get", "create", "get_or_create")
        if self.mode not in allowed:
            raise ValueError(f"comet.mode is get, create or get_or_create, got {self.mode!r}")
        return self


class DeepSpeedMonitorConfig(DeepSpeedConfigModel):
    """The four monitor sections together."""

    tensorboard: TensorBoardConfig = Field(
        default_factory=TensorBoardConfig, description="TensorBoard event files."
    )
    comet: CometConfig = Field(default_factory=CometConfig, description="Comet experiments.")
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases.")
    csv_monitor: CSVConfig = Field(default_factory=CSVConfig, description="CSV files.")

    @property
    def enabled(self) -> bool:
        """Whether any monitor is on."""
        sections = (self.tensorboard, self.comet, self.wandb, self.csv_monitor)
        return any(section.enabled for section in sections)


def get_monitor_config(param_dict: Mapping[str, Any]) -> DeepSpeedMonitorConfig:
    """Parse the monitor sections of a whole configuration."""
    given: dict[str, Any] = {
        name: section_of(param_dict, name)
        for name in DeepSpeedMonitorConfig.model_fields
        if param_dict.get(name) is not None
    }
    return DeepSpeedMonitorConfig(**given)
