# SPDX-License-Identifier: Apache-2.0
"""Legacy path of the table of builders, which lives in deepspeed.ops.op_builder.all_ops."""

from __future__ import annotations

import importlib


def __getattr__(name: str) -> object:
    if name in ("ALL_OPS", "accelerator_name"):
        return getattr(importlib.import_module("deepspeed.ops.op_builder.all_ops"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
