# SPDX-License-Identifier: Apache-2.0
"""File-like writers for ``torch.save``; looked up on first use."""

from __future__ import annotations

import importlib

_NAMES = ("FastFileWriter", "FastFileWriterConfig", "MockFileWriter", "PyFileWriter")


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.writers"), name)
