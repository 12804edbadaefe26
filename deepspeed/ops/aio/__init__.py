# SPDX-License-Identifier: Apache-2.0
"""Asynchronous file I/O: for now the builder that says it is not there."""

from __future__ import annotations

import importlib


def __getattr__(name: str) -> object:
    if name == "AsyncIOBuilder":
        return importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder
    raise AttributeError(f"module {__name__} has no attribute {name}")
