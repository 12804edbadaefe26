# SPDX-License-Identifier: Apache-2.0
"""Keyword arguments that techniques of training add to the model's forward: layers to skip, tokens to look at."""

from __future__ import annotations

from typing import Any

from .data_pipeline.curriculum_scheduler import CurriculumScheduler
from .progressive_layer_drop import ProgressiveLayerDrop


def build_techniques(engine: Any) -> None:
    """Set `engine.progressive_layer_drop` and `.curriculum_scheduler_legacy`: objects, or None where not asked for."""
    config = engine._config
    engine.progressive_layer_drop = engine.curriculum_scheduler_legacy = None
    if config.pld_enabled:
        engine.progressive_layer_drop = ProgressiveLayerDrop(**config.pld_params)
    if config.curriculum_enabled_legacy:
        engine.curriculum_scheduler_legacy = CurriculumScheduler(config.curriculum_params_legacy)


def with_techniques(engine: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a forward pass in training, with those of the techniques in use.

    Both depend on the number of steps alone, so a run that is resumed goes on where it was.
    """
    layer_drop, curriculum = engine.progressive_layer_drop, engine.curriculum_scheduler_legacy
    if layer_drop is not None:
        layer_drop.update_state(max(engine.global_steps - 1, 0))
        kwargs = {**kwargs, **layer_drop.get_state()}
    if curriculum is not None:
        difficulty = curriculum.update_difficulty(engine.global_steps + 1)
        by_length = engine.curriculum_params_legacy().get("curriculum_type") == "seqlen"
        if by_length and not engine.pipeline_parallelism:  # its layers take no such words
            kwargs = {**kwargs, "curriculum_seqlen": difficulty}
    return kwargs


def before_step(engine: Any) -> None:
    """Called before an optimizer step: what `engine.get_pld_theta` then says is of that step."""
    if engine.progressive_layer_drop is not None:
        engine.progressive_layer_drop.update_state(engine.global_steps)
