# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint engine a configuration asks for."""

from __future__ import annotations

from typing import Any

from .checkpoint_engine import CheckpointEngine


def create_checkpoint_engine(
    config_params: Any,
    groups: Any = None,
    zero_stage: int = 0,
    has_moe_layers: bool = False,
    optimize_dp_state: bool = False,
) -> CheckpointEngine:
    """Return the engine that stores and reads checkpoint files.

    Args:
        config_params: a parsed `DeepSpeedConfig`, or the dictionary of its section ``checkpoint``.
        groups, zero_stage, has_moe_layers, optimize_dp_state: accepted; the engine's mesh says the same.
    """
    section = getattr(config_params, "checkpoint_config", config_params) or {}
    writer = section.get("writer")
    if writer is None:
        from .torch_checkpoint_engine import TorchCheckpointEngine

        return TorchCheckpointEngine(section)
    if writer.get("decoupled"):
        from .decoupled_checkpoint_engine import DecoupledCheckpointEngine

        return DecoupledCheckpointEngine(section)
    from .torch_checkpoint_engine import FastCheckpointEngine

    return FastCheckpointEngine(section)
