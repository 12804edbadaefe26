# SPDX-License-Identifier: Apache-2.0
"""Build time of the native library; the legacy builder names are forwarded to the installed package.

Nothing here imports torch or deepspeed unless such a name is asked for.
"""

from __future__ import annotations

import importlib


def __getattr__(name: str) -> object:
    if name.endswith("Builder") or name in ("ALL_OPS", "MissingCUDAException"):
        return getattr(importlib.import_module("deepspeed.ops.op_builder"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
