# SPDX-License-Identifier: Apache-2.0
"""What depends on the version of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version


def required_torch_version(
    min_version: float | str | None = None, max_version: float | str | None = None
) -> bool:
    """Say whether torch's version (without its local part) is within the bounds, both included.

    Raises:
        AssertionError: no bound was given.
    """
    if min_version is None and max_version is None:
        raise AssertionError("required_torch_version needs min_version, max_version or both")
    have = Version(Version(torch.__version__).base_version)
    if min_version is not None and have < Version(str(min_version)):
        return False
    return max_version is None or have <= Version(str(max_version))


def register_grad_hook(
    param: torch.Tensor, hook: Callable[[torch.Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Call ``hook(param)`` each time a gradient has been added to ``param.grad``."""
    return param.register_post_accumulate_grad_hook(hook)


def jit_script_compat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function itself: torch.compile took TorchScript's place."""
    return fn


def is_functorch_transforming() -> bool:
    """Say whether a functorch transform (vmap, grad, ...) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None
