# SPDX-License-Identifier: Apache-2.0
"""The section ``aio``: asynchronous file access, for offload to disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..config_utils import PlainSection


class AioConfig(PlainSection):
    """``aio``."""

    section: ClassVar[str] = "aio"

    block_size: int = Field(default=2**20, description="Bytes of one request.")
    queue_depth: int = Field(default=8, description="Requests under way at a time.")
    intra_op_parallelism: int = Field(default=1, description="Threads that share one transfer.")
    single_submit: bool = Field(default=False, description="Submit requests one by one.")
    overlap_events: bool = Field(default=True, description="Submit and complete requests at once.")
    use_gds: bool = Field(default=False, description="GPUDirect Storage (CUDA only).")


def get_aio_config(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Parse section ``aio`` of a whole configuration into a dictionary with all defaults."""
    return AioConfig.of(param_dict).model_dump()
