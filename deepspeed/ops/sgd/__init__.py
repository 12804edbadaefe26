# SPDX-License-Identifier: Apache-2.0
"""SGD for params in the CPU's memory; each name is looked up on first use."""

from __future__ import annotations

import importlib

_TABLE = {"DeepSpeedCPUSGD": "cpu_sgd"}

__all__ = ["DeepSpeedCPUSGD"]


def __getattr__(name: str) -> object:
    if name not in _TABLE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_TABLE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
