# SPDX-License-Identifier: Apache-2.0
"""torch.compile, touched only when somebody compiles: importing dynamo takes seconds."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.torch import required_torch_version


def is_compile_supported() -> bool:
    """Say whether this torch has torch.compile for this Python."""
    return hasattr(torch, "compiler") and hasattr(torch, "compile")


def disable(func: Callable[..., Any]) -> Callable[..., Any]:
    """Keep ``func`` out of compiled graphs. Costs nothing while nobody compiles."""
    kept_out: list[Callable[..., Any]] = []

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return func(*args, **kwargs)
        if not kept_out:
            kept_out.append(torch.compiler.disable(func))
        return kept_out[0](*args, **kwargs)

    return call


lazy_disable = disable


def dummy_decorator(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function itself."""
    return func


def enable(min_version: float | str | None = None) -> Callable[..., Any]:
    """Return a decorator that compiles a function where torch is at least ``min_version``."""

    def decorate(func: Callable[..., Any]) -> Callable[..., Any]:
        new_enough = min_version is None or required_torch_version(min_version=min_version)
        if not (new_enough and is_compile_supported()):
            return func
        return torch.compile(func)

    return decorate


# Whether the caller is being traced for compilation. Torch's own function, for the compiler leaves that alone: one of ours,
# called between two graphs, would itself become a graph, which says yes.
is_compiling: Callable[[], bool] = torch.compiler.is_compiling


@contextlib.contextmanager
def compiled_autograd(enabled: bool, kwargs: dict[str, Any]) -> Iterator[None]:
    """Compile the backward pass inside the context.

    Args:
        enabled: False makes the context do nothing.
        kwargs: for torch.compile.
    """
    if not enabled:
        yield
        return
    from torch._dynamo import compiled_autograd as autograd

    renamed: Any = getattr(autograd, "_enable", None)
    enter = renamed or autograd.enable  # type: ignore[attr-defined]
    options = {"backend": get_accelerator().get_compile_backend(), **kwargs}
    with enter(torch.compile(**options)):
        yield
