# SPDX-License-Identifier: Apache-2.0
"""The section ``checkpoint``: how checkpoints are checked, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ...utils.errors import DeepSpeedConfigError, explain
from ..config_utils import PlainSection


class ValidationMode(str, Enum):
    """What to do when ranks save under different tags."""

    WARN = "WARN"
    """Log a warning."""
    IGNORE = "IGNORE"
    """Do not compare."""
    FAIL = "FAIL"
    """Raise."""


class CheckpointWriterConfig(PlainSection):
    """``checkpoint.writer``: the fast writers."""

    type: str = Field(default="FAST", description="MOCK (writes nothing), PYTHON or FAST.")
    io_buffer_size: int = Field(default=64 * 2**20, description="Bytes of the writer's buffer.")
    io_buffer_double: bool = Field(
        default=True, description="Fill one buffer while one is written."
    )
    show_statistics: bool = Field(default=False, description="Print speeds when a file is closed.")
    data_parallel: str | None = Field(
        default=None,
        description="Which ranks with equal weights write a file together: each REPLICA, or one of each "
        "SOCKET (NUMA node) or MACHINE; the first alone if absent.",
    )
    decoupled: bool = Field(
        default=False,
        description="Write while training goes on, at 250 MB/s for each core of a rank until the save is waited for.",
    )
    io_multiplier: int = Field(default=1, description="Write all so many times (to measure).")

    @field_validator("type", "data_parallel", mode="before")
    @classmethod
    def _known_word(cls, value: Any, info: Any) -> Any:
        words = {
            "type": ("MOCK", "PYTHON", "FAST"),
            "data_parallel": ("REPLICA", "SOCKET", "MACHINE"),
        }
        allowed = words[info.field_name]
        word = value.upper() if isinstance(value, str) else value
        if word in allowed or (word is None and info.field_name == "data_parallel"):
            return word
        key = f"checkpoint.writer.{info.field_name}"
        raise DeepSpeedConfigError(
            explain(f"'{key}' is unknown", got=repr(value), expected=", ".join(allowed))
        )


class ParallelWriteConfig(PlainSection):
    """``checkpoint.parallel_write``."""

    pipeline_stage: bool = Field(
        default=False, description="Pipeline stages write their layers at once."
    )

    @field_validator("pipeline_stage", mode="before")
    @classmethod
    def _only_bool(cls, value: Any) -> bool:
        if value in (True, False):  # 0 and 1 count as they do in Python
            return bool(value)
        key = "checkpoint.parallel_write.pipeline_stage"
        raise DeepSpeedConfigError(
            explain(f"'{key}' is not a bool", got=repr(value), expected="true or false")
        )


class CheckpointConfig(PlainSection):
    """``checkpoint``."""

    section: ClassVar[str] = "checkpoint"

    tag_validation: str = Field(
        default="WARN", description="When ranks save under different tags: Ignore, Warn or Fail."
    )
    load_universal: bool = Field(default=False, description="Load a universal checkpoint.")
    use_node_local_storage: bool = Field(
        default=False, description="Folders are local to each node: its local rank 0 makes them."
    )
    parallel_write: ParallelWriteConfig = Field(
        default_factory=ParallelWriteConfig, description="Which ranks write at once."
    )
    checkpoint_serialization: bool = Field(default=True, description="torch.save's zip format.")
    writer: CheckpointWriterConfig | None = Field(
        default=None, description="A fast writer, if given."
    )

    @field_validator("tag_validation", mode="before")
    @classmethod
    def _known_mode(cls, value: Any) -> str:
        mode = value.upper() if isinstance(value, str) else value
        if mode not in ValidationMode.__members__:
            what = "'checkpoint.tag_validation' is unknown"
            raise DeepSpeedConfigError(
                explain(what, got=repr(value), expected="Ignore, Warn or Fail")
            )
        return mode


def get_checkpoint_config(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Parse section ``checkpoint`` into the dictionary that checkpoint engines take."""
    keys = {"tag_validation", "checkpoint_serialization", "writer"}
    return CheckpointConfig.of(param_dict).model_dump(include=keys)
