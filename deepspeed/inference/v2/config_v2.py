# SPDX-License-Identifier: Apache-2.0
"""The configuration of the ragged-batching engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from ...runtime.config_utils import DeepSpeedConfigModel


class DeepSpeedTPConfig(DeepSpeedConfigModel):
    """``tensor_parallel`` (or ``tp``)."""

    tp_size: int = Field(default=1, description="Ranks of the tensor-parallel group.")


class MemoryConfig(DeepSpeedConfigModel):
    """``memory_config``: how large the cache is."""

    mode: Literal["reserve", "allocate"] = Field(
        default="reserve", description="reserve: bytes left free; allocate: cache blocks."
    )
    size: PositiveInt = Field(default=1_000_000_000, description="How many of them.")


class DSStateManagerConfig(DeepSpeedConfigModel):
    """``state_manager`` (or ``manager``): sequences and their cache blocks."""

    max_tracked_sequences: PositiveInt = Field(
        default=2048, description="Sequences known at a time."
    )
    max_ragged_batch_size: PositiveInt = Field(default=768, description="Tokens of one put().")
    max_ragged_sequence_count: PositiveInt = Field(
        default=512, description="Sequences of one put()."
    )
    max_context: PositiveInt = Field(default=8192, description="Longest sequence, in tokens.")
    memory_config: MemoryConfig = Field(
        default_factory=MemoryConfig, description="How large the cache is."
    )
    offload: bool = Field(default=False, description="Move idle cache blocks to host memory.")

    @model_validator(mode="after")
    def _fits(self) -> DSStateManagerConfig:
        for name in ("max_tracked_sequences", "max_ragged_batch_size"):
            if getattr(self, name) < self.max_ragged_sequence_count:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) is below max_ragged_sequence_count"
                    f" ({self.max_ragged_sequence_count}): raise the one or lower the other"
                )
        return self


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
