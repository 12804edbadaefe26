# SPDX-License-Identifier: Apache-2.0
"""Makes the engine for rollouts that a configuration names."""

from __future__ import annotations

from typing import Any

from deepspeed.utils.errors import explain

from .base import RolloutConfig, RolloutEngine
from .hybrid_engine_rollout import HybridEngineRollout, HybridEngineRolloutConfig


def build_rollout(
    rollout_cfg: RolloutConfig, student_engine: Any = None, tokenizer: Any = None
) -> RolloutEngine:
    """The engine that `rollout_cfg` names.

    Args:
        rollout_cfg: the configuration.
        student_engine: the training engine, whose weights generate.
        tokenizer: for its padding and ending tokens.

    Raises:
        ValueError: another engine's name, or an argument that the engine needs is missing.
    """
    if rollout_cfg.engine != HybridEngineRollout.name:
        raise ValueError(
            explain(
                "Unknown rollout engine", got=rollout_cfg.engine, expected=HybridEngineRollout.name
            )
        )
    if student_engine is None or tokenizer is None:
        raise ValueError(
            explain(
                f"rollout engine {rollout_cfg.engine!r} needs both student_engine and tokenizer",
                got=f"student_engine={student_engine!r}, tokenizer={tokenizer!r}",
            )
        )
    config = HybridEngineRolloutConfig(use_graph_capture=rollout_cfg.use_graph_capture)
    return HybridEngineRollout(student_engine, tokenizer, config)
