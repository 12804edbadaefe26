# SPDX-License-Identifier: Apache-2.0
"""The engine's side of compression: when techniques begin, and quantization after each step (MoQ)."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.compression.scheduler import compression_scheduler
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .config_errors import ConfigAssertionError
from .quantize import Quantizer


def build(engine: Any) -> None:
    """Set `engine.compression_scheduler` and `engine.quantizer`, where they are asked for.

    Raises:
        AssertionError: (as ``ConfigAssertionError``) quantization in the step, of weights that are their own masters.
    """
    config = engine._config.compression_config
    techniques = {
        name: section["shared_parameters"]
        for name, section in config.items()
        if name != "layer_reduction" and section["shared_parameters"]["enabled"]
    }
    if not techniques:
        return
    engine.compression_scheduler = compression_scheduler(engine.module, config)
    if engine.compression_scheduler.pruner is not None:
        engine.compression_scheduler.pruner.axis = engine.mesh.sequence_data
    if not engine.compression_scheduler.layers:
        logger.warning(
            f"compression_training enables {', '.join(techniques)}, and no layer is prepared: call "
            "deepspeed.compression.init_compression(model, config) before deepspeed.initialize"
        )
    weights = techniques.get("weight_quantization")
    if weights is not None and not weights["quantize_weight_in_forward"]:
        engine.quantizer = _quantizer(engine, weights)
    # what begins at step 0 does so before the first forward pass, also of a module that is called by itself
    engine.compression_scheduler.step(step_zero_check=True)


def _quantizer(engine: Any, settings: dict[str, Any]) -> Quantizer:
    key = "compression_training.weight_quantization.shared_parameters.quantize_weight_in_forward"
    if not (engine.fp16_enabled() or engine.bfloat16_enabled()):
        raise ConfigAssertionError(
            "MoQ (quantize in optimization step) weight quantization is only supported for FP16 and BF16: "
            f"set {key} to true."
        )
    if engine.precision.low_precision_master or engine.plan.stage == 3:
        raise ConfigAssertionError(
            explain(
                "quantization in the optimizer's step needs whole weights with fp32 masters",
                got="ZeRO stage 3" if engine.plan.stage == 3 else "masters of 16 bits",
                fix=f"Set {key} to true.",
            )
        )
    mixed = settings["fp16_mixed_quantize"]
    return Quantizer(
        settings["quantize_groups"],
        mixed["enabled"],
        mixed["quantize_change_ratio"],
        settings["quantization_type"],
        settings["rounding"],
        settings["quantize_verbose"],
        False,
        settings["quantizer_kernel"],
    )


def start(engine: Any) -> None:
    """Called when the optimizer has its masters: round for the first forward pass, if quantization begins at step 0."""
    if engine.quantizer is not None:
        params = list(engine.module.parameters())
        engine.quantizer.resume(params, 0)  # it remembers the bits and periods that all begin with
        if engine.compression_scheduler.weight_quantization_enabled:
            engine.quantizer.quantize([params], False)


def after_step(engine: Any) -> None:
    """Called after an optimizer step that was applied: round what is to be rounded, and begin what is due."""
    scheduler = engine.compression_scheduler
    if scheduler is None:
        return
    if engine.quantizer is not None and scheduler.weight_quantization_enabled:
        engine.quantizer.quantize([list(engine.module.parameters())], False)
    scheduler.step()


def resume(engine: Any) -> None:
    """Called when a checkpoint has been loaded: all depends on the number of steps that were applied."""
    scheduler = engine.compression_scheduler
    if scheduler is None:
        return
    applied = engine.global_steps - engine.skipped_steps
    scheduler.resume(applied)
    quantizer = engine.quantizer
    if quantizer is None:
        return
    offset = scheduler.offsets["weight_quantization"]
    calls = max(applied - offset, 0) + (offset == 0)  # one before the first step
    params = list(engine.module.parameters())
    quantizer.resume(params, calls)
    if not calls or engine.optimizer is None:
        return
    engine.optimizer.update_lp_params()  # values that were rounded once give other scales
    with torch.no_grad():
        for param in params:
            bits = getattr(param, "start_bits", None)
            if bits and param.dim() > 1:
                param.data.copy_(quantizer.compute_quantization(param.data, bits))
