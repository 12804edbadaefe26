# SPDX-License-Identifier: Apache-2.0
"""Sequences and the blocks of the key-value cache that they hold; looked up on first use."""

from __future__ import annotations

import importlib

_NAMES = {
    "BlockedAllocator": ".blocked_allocator",
    "BlockedKVCache": ".kv_cache",
    "DSSequenceDescriptor": ".sequence_descriptor",
    "DSStateManager": ".ragged_manager",
    "DSStateManagerConfig": "..config_v2",
    "MemoryConfig": "..config_v2",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(_NAMES[name], __name__), name)
