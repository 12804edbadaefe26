# SPDX-License-Identifier: Apache-2.0
"""Adam optimizers; each name is looked up on first use."""

from __future__ import annotations

import importlib

_TABLE = {
    "DeepSpeedCPUAdam": "cpu_adam",
    "FusedAdam": "fused_adam",
    "ZenFlowCPUAdam": "zenflow_cpu_adam",
    "ZenFlowSelectiveAdamW": "zenflow_torch_adam",
    "ZenFlowSelectiveAdamW_stage3": "zenflow_torch_adam",
}

__all__ = [
    "DeepSpeedCPUAdam",
    "FusedAdam",
    "ZenFlowCPUAdam",
    "ZenFlowSelectiveAdamW",
    "ZenFlowSelectiveAdamW_stage3",
]


def __getattr__(name: str) -> object:
    if name not in _TABLE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_TABLE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
