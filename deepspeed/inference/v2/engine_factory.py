# SPDX-License-Identifier: Apache-2.0
"""Engines of ragged batches from folders and names of models."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from deepspeed.utils.errors import DeepSpeedCheckpointError, explain
from deepspeed.utils.logging import logger

from .config_v2 import RaggedInferenceEngineConfig
from .engine_v2 import InferenceEngineV2


def build_hf_engine(
    path: str | os.PathLike[str],
    engine_config: RaggedInferenceEngineConfig | dict[str, Any] | None = None,
    debug_level: int = logging.INFO,
) -> InferenceEngineV2:
    """Load a causal model of transformers, in the dtype that it was saved in, and serve it.

    Args:
        path: a folder, or a name on the hub.
        engine_config: see `InferenceEngineV2`.
        debug_level: of the logger, while the model is loaded.

    Raises:
        OSError: there is no such model.
        DeepSpeedConfigError, ValueError: see `InferenceEngineV2`.
    """
    from transformers import AutoModelForCausalLM  # takes seconds, and most programs do not need it

    before = logger.level
    logger.setLevel(debug_level)
    try:
        model = AutoModelForCausalLM.from_pretrained(os.fspath(path), torch_dtype="auto")
        return InferenceEngineV2(model, engine_config)
    finally:
        logger.setLevel(before)


def build_engine_from_ds_checkpoint(
    path: str | os.PathLike[str],
    engine_config: RaggedInferenceEngineConfig | dict[str, Any] | None = None,
    debug_level: int = logging.INFO,
) -> InferenceEngineV2:
    """Serve what `InferenceEngineV2.serialize` saved.

    Raises:
        DeepSpeedCheckpointError: the folder holds no such model.
    """
    if not (Path(path) / "config.json").is_file():
        raise DeepSpeedCheckpointError(
            explain(
                "there is no saved engine",
                got=str(path),
                expected="a folder that InferenceEngineV2.serialize wrote",
                fix="Serialize an engine again; upstream's own flattened files are not read.",
            )
        )
    return build_hf_engine(path, engine_config, debug_level)
