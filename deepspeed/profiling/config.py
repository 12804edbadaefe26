# SPDX-License-Identifier: Apache-2.0
"""The section ``flops_profiler``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..runtime.config_utils import PlainSection


class DeepSpeedFlopsProfilerConfig(PlainSection):
    """``flops_profiler``: count operations of one step, by module."""

    section: ClassVar[str] = "flops_profiler"

    enabled: bool = Field(default=False, description="Profile one step and print the table.")
    recompute_fwd_factor: float = Field(
        default=0.0, description="Forward passes repeated by activation checkpointing, 0.0 to 1.0."
    )
    profile_step: int = Field(default=1, description="Step to profile; the first ones warm up.")
    module_depth: int = Field(default=-1, description="Depth of the printed tree; -1 is the whole.")
    top_modules: int = Field(default=1, description="Modules listed at each depth.")
    detailed: bool = Field(default=True, description="Print the tree of modules as well.")
    output_file: str | None = Field(
        default=None, description="File for the table instead of stdout."
    )


def get_flops_profiler_config(param_dict: Mapping[str, Any]) -> DeepSpeedFlopsProfilerConfig:
    """Parse section ``flops_profiler`` of a whole configuration."""
    return DeepSpeedFlopsProfilerConfig.of(param_dict)
