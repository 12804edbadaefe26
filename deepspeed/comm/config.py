# SPDX-License-Identifier: Apache-2.0
"""The section ``comms_logger``: recording how long collectives take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ..runtime.config_utils import DeepSpeedConfigModel, section_of


class CommsLoggerConfig(DeepSpeedConfigModel):
    """``comms_logger``: time and size of each collective."""

    enabled: bool = Field(default=False, description="Record collectives.")
    prof_all: bool = Field(default=True, description="Record all of them; false: only prof_ops.")
    prof_ops: list[str] = Field(default_factory=list, description="Names of those to record.")
    verbose: bool = Field(default=False, description="Log each collective as it ends.")
    debug: bool = Field(default=False, description="Add the caller's name to each record.")


class DeepSpeedCommsConfig:
    """What the communication layer reads of a whole configuration."""

    def __init__(self, ds_config: Mapping[str, Any]) -> None:
        """Parse ``comms_logger``; ``comms_logger_enabled`` tells whether the section is there."""
        self.comms_logger_enabled = ds_config.get("comms_logger") is not None
        self.comms_logger = CommsLoggerConfig(**section_of(ds_config, "comms_logger"))
