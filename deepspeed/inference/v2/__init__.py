# SPDX-License-Identifier: Apache-2.0
"""Ragged batching with a blocked key-value cache; looked up on first use."""

from __future__ import annotations

import importlib

_NAMES = {
    "DeepSpeedTPConfig": "config_v2",
    "InferenceEngineV2": "engine_v2",
    "RaggedInferenceEngineConfig": "config_v2",
    "build_engine_from_ds_checkpoint": "engine_factory",
    "build_hf_engine": "engine_factory",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
