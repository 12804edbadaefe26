# SPDX-License-Identifier: Apache-2.0
"""The configuration of the ragged-batching engine."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...runtime.config_utils import DeepSpeedConfigModel


class DeepSpeedTPConfig(DeepSpeedConfigModel):
    """``tensor_parallel`` (or ``tp``)."""

    tp_size: int = Field(default=1, description="Ranks of the tensor-parallel group.")


class DSStateManagerConfig(DeepSpeedConfigModel):
    """``state_manager`` (or ``manager``): sequences and their cache blocks."""

    max_tracked_sequences: int = Field(default=2048, description="Sequences known at a time.")
    max_ragged_batch_size: int = Field(default=768, description="Tokens of one forward pass.")
    max_ragged_sequence_count: int = Field(
        default=512, description="Sequences of one forward pass."
    )
    max_context: int = Field(default=8192, description="Longest sequence, in tokens.")
    memory_config: dict[str, Any] = Field(
        default_factory=lambda: {"mode": "reserve", "size": 1_000_000_000},
        description="mode reserve (bytes left free) or allocate (blocks), and size.",
    )
    offload: bool = Field(default=False, description="Move idle cache blocks to host memory.")


class QuantizationConfig(DeepSpeedConfigModel):
    """``quantization``."""

    quantization_mode: str | None = Field(default=None, description="Such as wf6af16; null is off.")


class RaggedInferenceEngineConfig(DeepSpeedConfigModel):
    """Everything that the ragged-batching engine takes."""

    tensor_parallel: DeepSpeedTPConfig = Field(
        default_factory=DeepSpeedTPConfig, alias="tp", description="Tensor parallelism."
    )
    state_manager: DSStateManagerConfig = Field(
        default_factory=DSStateManagerConfig, alias="manager", description="Sequences and cache."
    )
    quantization: QuantizationConfig = Field(
        default_factory=QuantizationConfig, description="Weight quantisation."
    )
