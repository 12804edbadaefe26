# SPDX-License-Identifier: Apache-2.0
"""The section ``activation_checkpointing``; ``deepspeed.checkpointing.configure`` reads it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..config_utils import PlainSection


class DeepSpeedActivationCheckpointingConfig(PlainSection):
    """``activation_checkpointing``."""

    section: ClassVar[str] = "activation_checkpointing"

    partition_activations: bool = Field(
        default=False, description="Shard saved inputs over TP ranks."
    )
    contiguous_memory_optimization: bool = Field(
        default=False, description="Copy saved inputs to one buffer; needs number_checkpoints."
    )
    cpu_checkpointing: bool = Field(default=False, description="Keep saved inputs in host memory.")
    number_checkpoints: int | None = Field(
        default=None, description="Checkpointed blocks of the model."
    )
    synchronize_checkpoint_boundary: bool = Field(
        default=False, description="Wait for the device there."
    )
    profile: bool = Field(default=False, description="Time each checkpointed block.")
