# SPDX-License-Identifier: Apache-2.0
"""Lion optimizers; each name is looked up on first use."""

from __future__ import annotations

import importlib

_TABLE = {"DeepSpeedCPULion": "cpu_lion", "FusedLion": "fused_lion"}

__all__ = ["DeepSpeedCPULion", "FusedLion"]


def __getattr__(name: str) -> object:
    if name not in _TABLE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_TABLE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
