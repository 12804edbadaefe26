# SPDX-License-Identifier: Apache-2.0
"""Whether a batch can be run, and why not."""

from __future__ import annotations

from enum import Enum

from deepspeed.utils.errors import DeepSpeedError, explain


class SchedulingResult(Enum):
    """What `InferenceEngineV2.can_schedule` finds."""

    Success = 0
    EngineSequenceLimitExceeded = 1
    """More sequences than the engine tracks."""
    BatchSequenceLimitExceeded = 2
    """More sequences than a batch holds."""
    BatchTokenLimitExceeded = 3
    """More tokens than a batch holds."""
    KVCacheLimitExceeded = 4
    """More blocks than are free."""
    SequenceTokenLimitExceeded = 5
    """A sequence longer than `max_context`."""


class SchedulingError(DeepSpeedError, RuntimeError):
    """A batch that cannot be run.

    Attributes:
        status: why.
    """

    def __init__(self, result: SchedulingResult) -> None:
        self.status = result
        super().__init__(
            explain(
                "the batch cannot be run",
                got=result.name,
                fix="Ask can_schedule() first, put() fewer sequences or tokens, or flush() what is done.",
            )
        )
