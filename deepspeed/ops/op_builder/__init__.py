# SPDX-License-Identifier: Apache-2.0
"""Legacy doors to the native ops: ``CPUAdamBuilder().load()`` and its like; looked up on first use."""

from __future__ import annotations

import importlib

_BASES = (
    "CUDAMismatchException",
    "CUDAOpBuilder",
    "MissingCUDAException",
    "OpBuilder",
    "TorchCPUOpBuilder",
    "installed_cuda_version",
)


def __getattr__(name: str) -> object:
    if name in _BASES:
        return getattr(importlib.import_module(f"{__name__}.builder"), name)
    if name.endswith("Builder") or name == "ALL_OPS":
        table = importlib.import_module(f"{__name__}.all_ops")
        found = table.ALL_OPS if name == "ALL_OPS" else table.BUILDERS.get(name)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__} has no attribute {name}")
