# SPDX-License-Identifier: Apache-2.0
"""The processes of a save: what one of them does, all succeed in or all raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..utils.errors import DeepSpeedCheckpointError, explain

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """The processes that take part in a save.

    Attributes:
        rank, size: this process among them.
        leads: whether this process does the folder work of its file system.
        exchange: gives every process the list of all processes' objects, by rank.
    """

    rank: int = 0
    size: int = 1
    leads: bool = True
    exchange: Callable[[object], list[Any]] = lambda item: [item]

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; return all results, or raise on every rank when one failed.

        Raises:
            DeepSpeedCheckpointError: another rank failed (the failing rank raises its own error).
        """
        result, failure = None, None
        try:
            result = action()
        except Exception as error:  # told to the others first, then raised below
            failure = error
        told = self.exchange((f"{type(failure).__name__}: {failure}" if failure else None, result))
        if failure is not None:
            raise failure
        errors = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(told) if text]
        if errors:
            raise DeepSpeedCheckpointError(
                explain(
                    "the checkpoint was not completed, other ranks failed", got="; ".join(errors)
                )
            )
        return [value for _, value in told]
