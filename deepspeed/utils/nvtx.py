# SPDX-License-Identifier: Apache-2.0
"""Ranges in the profiler's timeline, one a call, while CUDA is in use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

DEEPSPEED_NVTX_DOMAIN = "DeepSpeed"
enable_nvtx = True


def instrument_w_nvtx(func: Callable[P, R]) -> Callable[P, R]:
    """Show each call of ``func`` as a range of its name in a CUDA profile."""

    @functools.wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (enable_nvtx and torch.cuda.is_initialized()) or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        torch.cuda.nvtx.range_push(func.__qualname__)
        try:
            return func(*args, **kwargs)
        finally:
            torch.cuda.nvtx.range_pop()

    return call
