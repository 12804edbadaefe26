# SPDX-License-Identifier: Apache-2.0
"""The section ``timers``: which timers run and whether they wait for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..runtime.config_utils import DeepSpeedConfigModel, PlainSection


class DeepSpeedThroughputTimerConfig(DeepSpeedConfigModel):
    """``timers.throughput``: samples per second of the whole step."""

    enabled: bool = Field(default=True, description="Measure samples per second.")
    synchronized: bool = Field(default=True, description="Wait for the device at each reading.")


class DeepSpeedTimersConfig(PlainSection):
    """``timers``."""

    section: ClassVar[str] = "timers"

    throughput: DeepSpeedThroughputTimerConfig = Field(
        default_factory=DeepSpeedThroughputTimerConfig, description="The throughput timer."
    )


def get_timers_config(param_dict: Mapping[str, Any]) -> DeepSpeedThroughputTimerConfig:
    """Parse ``timers.throughput`` of a whole configuration."""
    return DeepSpeedTimersConfig.of(param_dict).throughput
