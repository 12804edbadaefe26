# SPDX-License-Identifier: Apache-2.0
"""The section ``nebula``: Azure's asynchronous checkpoint service."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..runtime.config_utils import PlainSection


class DeepSpeedNebulaConfig(PlainSection):
    """``nebula``: checkpoints kept by the Nebula service."""

    section: ClassVar[str] = "nebula"

    enabled: bool = Field(default=False, description="Save through Nebula.")
    nebula_load_path: str | None = Field(default=None, description="Where to load from instead.")
    enable_nebula_load: bool = Field(default=True, description="Load through Nebula too.")
    persistent_storage_path: str | None = Field(
        default=None, description="Folder of the last tier."
    )
    persistent_time_interval: int = Field(
        default=100, description="Seconds between two persisted ones."
    )
    num_of_version_in_retention: int = Field(default=2, description="Checkpoints kept in memory.")
