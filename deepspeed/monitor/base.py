# SPDX-License-Identifier: Apache-2.0
"""What every recorder has: a section of the config, and events that only rank 0 writes."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from deepspeed.utils.errors import explain

Event = tuple[str, Any, int]  # name, value, step (the number of samples seen so far)


class Monitor(ABC):
    """A recorder of events.

    Args:
        monitor_config: the recorder's section of the config.
    """

    def __init__(self, monitor_config: Any) -> None:
        self.monitor_config = monitor_config

    @abstractmethod
    def write_events(self, event_list: Sequence[Event]) -> None:
        """Record `(name, value, step)` triples. Does nothing on ranks other than 0."""


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0


def plain(value: Any) -> Any:
    """A tensor of one element as a Python number; anything else as it is."""
    return value.item() if torch.is_tensor(value) else value


def require(module: str, package: str, section: str) -> Any:
    """Import a recorder's package.

    Raises:
        ModuleNotFoundError: it is not installed; the message names it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            explain(
                f"section '{section}' is enabled, but package '{package}' is not installed",
                fix=f"Run `pip install {package}`, or set {section}.enabled to false.",
            ),
            name=error.name,
        ) from error
