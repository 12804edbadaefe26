# SPDX-License-Identifier: Apache-2.0
"""Legacy path of the builders' base classes, which live in deepspeed.ops.op_builder.builder."""

from __future__ import annotations

import importlib


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module("deepspeed.ops.op_builder.builder"), name)
