# SPDX-License-Identifier: Apache-2.0
"""Ranges in the profiler's timeline, one a call, where the accelerator has a profiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.compiler import is_compiling

from deepspeed.accelerator import get_accelerator

P = ParamSpec("P")
R = TypeVar("R")

DEEPSPEED_NVTX_DOMAIN = "DeepSpeed"
enable_nvtx = True


def instrument_w_nvtx(func: Callable[P, R]) -> Callable[P, R]:
    """Show each call of ``func`` as a range of its name in a profile."""

    @functools.wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not enable_nvtx or is_compiling():
            return func(*args, **kwargs)
        accelerator = get_accelerator()
        # accelerators of others may not know domains
        domain = (
            {"domain": DEEPSPEED_NVTX_DOMAIN}
            if getattr(accelerator, "supports_nvtx_domain", False)
            else {}
        )
        accelerator.range_push(func.__qualname__, **domain)
        try:
            return func(*args, **kwargs)
        finally:
            accelerator.range_pop(**domain)

    return call
