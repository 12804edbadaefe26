# SPDX-License-Identifier: Apache-2.0
"""The owner of stage 3's module hooks, under the name that callers know; what an engine without optimizer holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from deepspeed.runtime.base_optimizer import ZeROOptimizer

from .partition_parameters import GatheredParameters
from .residency import Residency


class ParamCoordinator:
    """The record of the order of modules, as callers see it.

    Args:
        residency: what keeps the record.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def is_invalid_trace(self) -> bool:
        """Whether the next pass is going to be recorded."""
        return not self._residency.knows_order

    def _invalidate_trace(self) -> None:
        self._residency.forget_order()


class DeepSpeedZeRoOffload(ZeROOptimizer):
    """Keeps a module's parameters sharded, and whole while they are in use.

    Args:
        residency: what does it.
    """

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.module = residency.module
        self.param_coordinator = ParamCoordinator(residency)
        self.param_groups: list[dict[str, Any]] = []
        self.overflow = False

    @property
    def persistent_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters small enough to stay whole between steps."""
        return self.residency.persistent

    @property
    def forward_hooks(self) -> list[Any]:
        """Handles of the module hooks; callers may remove them and assign []."""
        return self.residency.forward_hooks

    @forward_hooks.setter
    def forward_hooks(self, value: list[Any]) -> None:
        self.residency.forward_hooks = value

    @property
    def backward_hooks(self) -> list[Any]:
        """Handles of further hooks."""
        return self.residency.backward_hooks

    @backward_hooks.setter
    def backward_hooks(self, value: list[Any]) -> None:
        self.residency.backward_hooks = value

    def _register_deepspeed_module(
        self, module: torch.nn.Module, count: list[int] | None = None
    ) -> None:
        self.residency.hook(module)

    def partition_all_parameters(self) -> None:
        """Let go of everything that is whole."""
        self.residency.release_all()

    def empty_partition_cache(self) -> None:
        """Let go of everything that is whole."""
        self.residency.release_all()

    def destroy(self) -> None:
        """Remove the module hooks; parameters stay sharded."""
        self.residency.remove_hooks()


@contextlib.contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[torch.nn.Module]:
    """Context in which an engine's module is whole and free of stage 3's hooks, to be called many times in a row.

    Args:
        model: an engine of any stage; every rank must enter.

    Yields:
        The module.
    """
    residency = model.residency
    if residency is None:
        yield model.module
        return
    with GatheredParameters(model.module.parameters()):
        residency.remove_hooks()
        try:
            yield model.module
        finally:
            residency.hook(residency.module)
