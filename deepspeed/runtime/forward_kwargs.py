# SPDX-License-Identifier: Apache-2.0
"""Keyword arguments that techniques of training add to the model's forward: layers to skip, tokens to look at."""

from __future__ import annotations

from typing import Any

from . import compressing
from .data_pipeline.curriculum_scheduler import CurriculumScheduler
from .data_pipeline.data_routing.scheduler import RandomLTDScheduler
from .progressive_layer_drop import ProgressiveLayerDrop


def build_techniques(engine: Any) -> None:
    """Set `engine.progressive_layer_drop`, `.curriculum_scheduler_legacy`, `.random_ltd_scheduler`, and what compresses.

    They are None where they are not asked for.
    """
    compressing.build(engine)
    config = engine._config
    engine.progressive_layer_drop = engine.curriculum_scheduler_legacy = None
    engine.random_ltd_scheduler = None
    if config.pld_enabled:
        engine.progressive_layer_drop = ProgressiveLayerDrop(**config.pld_params)
    if config.curriculum_enabled_legacy:
        engine.curriculum_scheduler_legacy = CurriculumScheduler(config.curriculum_params_legacy)
    routing = config.data_efficiency_config["data_routing"]
    if config.data_efficiency_enabled and routing["enabled"] and routing["random_ltd"]["enabled"]:
        routing["random_ltd"] |= {
            "global_batch_size": engine.train_batch_size(),
            "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        }
        engine.random_ltd_scheduler = RandomLTDScheduler(routing["random_ltd"])


def with_techniques(engine: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a forward pass in training, with those of the techniques in use.

    Both depend on the number of steps alone, so a run that is resumed goes on where it was.
    """
    count_tokens(engine)
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


def count_tokens(engine: Any) -> None:
    """Called before a forward pass in training: how many tokens layers keep at this step, and those that they see."""
    if engine.random_ltd_scheduler is not None:
        engine.random_ltd_scheduler.update_seq(engine.global_steps)


def take_step(engine: Any) -> bool:
    """Step the engine's optimizer, with what techniques do before and after; returns whether weights have changed.

    What `engine.get_pld_theta` then says is of that step.
    """
    if engine.progressive_layer_drop is not None:
        engine.progressive_layer_drop.update_state(engine.global_steps)
    applied = engine.driver.step()
    if applied:
        compressing.after_step(engine)
    return applied
