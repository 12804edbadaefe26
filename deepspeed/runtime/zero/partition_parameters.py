# SPDX-License-Identifier: Apache-2.0
"""The public names for parameters that are sharded over ranks (ZeRO stage 3).

Stage 3 is not part of this version, so no parameter is ever sharded: gathering is what it must be for whole
parameters, nothing, and asking for sharding raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from types import TracebackType
from typing import Any

import torch

from deepspeed.utils.errors import explain

from .utils import is_zero_param

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "is_zero_param",
    "register_external_parameter",
]


class ZeroParamType(Enum):
    """How a parameter takes part in sharding."""

    NORMAL = 1
    """Whole on every rank."""
    PARTITIONED = 2
    """Sharded, gathered before use."""
    REMOTE = 3
    """Held by another device."""


class ZeroParamStatus(Enum):
    """Where a sharded parameter's values are."""

    AVAILABLE = 1
    """Gathered: whole on this rank."""
    NOT_AVAILABLE = 2
    """Only this rank's shard is here."""
    INFLIGHT = 3
    """Being gathered."""


class Init:
    """Context in which modules are built with sharded parameters.

    Args:
        enabled: False makes it do nothing.
        *_, **__: as upstream; without meaning while stage 3 is not built.

    Raises:
        NotImplementedError: on entering it enabled.
    """

    def __init__(self, *_: Any, enabled: bool = True, **__: Any) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        if self.enabled:
            raise NotImplementedError(
                explain(
                    "deepspeed.zero.Init builds models with sharded parameters, which needs ZeRO stage 3",
                    got="a version without stage 3",
                    fix="set zero_optimization.stage to 2 or less",
                )
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave everything as it is."""


class GatheredParameters:
    """Context in which sharded parameters are whole; whole ones are left as they are.

    Args:
        params: a parameter, or an iterable of tensors.
        modifier_rank: rank whose edits are kept; None where nothing is edited.
        fwd_module: module to which the parameters are registered as external.
        enabled: False makes it do nothing.
    """

    def __init__(
        self,
        params: torch.Tensor | Iterable[torch.Tensor],
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self.params = [params] if isinstance(params, torch.Tensor) else list(params)
        self.enabled = enabled and any(is_zero_param(p) for p in self.params)
        assert not self.enabled, "sharded parameters exist only at stage 3"

    def __enter__(self) -> None:
        """Everything is whole already."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing was gathered."""


def register_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Say that `module` uses `parameter` of another module in its forward pass; whole parameters need no such word.

    Raises:
        RuntimeError: if `parameter` is no parameter.
    """
    if not isinstance(parameter, torch.nn.Parameter):
        raise RuntimeError(
            explain(
                "Parameter is not a torch.nn.Parameter",
                got=type(parameter).__name__,
                expected="torch.nn.Parameter",
            )
        )
