# SPDX-License-Identifier: Apache-2.0
"""Running a trained model; names are looked up on first use."""

from __future__ import annotations

import importlib

_NAMES = {
    "DeepSpeedInferenceConfig": "config",
    "InferenceEngine": "engine",
    "InferenceEngineV2": "v2",
    "RaggedInferenceEngineConfig": "v2",
    "build_engine_from_ds_checkpoint": "v2",
    "build_hf_engine": "v2",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
