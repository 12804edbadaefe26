# SPDX-License-Identifier: Apache-2.0
"""When each technique begins: it counts optimizer steps and switches layers on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from deepspeed.utils.logging import log_dist

from .layer_parts import Compressed
from .snip import SnipPruner
from .techniques import SNIP, TECHNIQUES, shared


class compression_scheduler:
    """Switches a model's prepared layers on, each technique at its `schedule_offset`.

    Args:
        model: what `init_compression` has returned; an engine's module is its model.
        compression_config: the parsed section.

    Attributes:
        training_steps: optimizer steps that were taken.
        weight_quantization_enabled: whether quantization of weights has begun.
    """

    def __init__(self, model: nn.Module, compression_config: Mapping[str, Any]) -> None:
        inner = getattr(model, "module", model)
        self.model, self.compression_config = model, compression_config
        self.training_steps = 0
        self.weight_quantization_enabled = False
        self.layers = {
            name: layer for name, layer in inner.named_modules() if isinstance(layer, Compressed)
        }
        self.offsets = {
            technique: shared(compression_config, technique)["schedule_offset"]
            for technique in TECHNIQUES
            if shared(compression_config, technique)["enabled"]
        }
        self.begun: set[str] = set()
        self.pruner: SnipPruner | None = None
        sparse = shared(compression_config, "sparse_pruning")
        if "sparse_pruning" in self.offsets and sparse["method"] == SNIP:
            self.pruner = SnipPruner(self.layers, sparse)

    def step(self, step_zero_check: bool = False) -> None:
        """Count an optimizer step, unless `step_zero_check`, and begin what is due."""
        if not step_zero_check:
            self.training_steps += 1
        self.check_all_modules()

    def resume(self, training_steps: int) -> None:
        """Go on after that many steps."""
        self.training_steps = training_steps
        self.check_all_modules()

    def check_all_modules(self) -> None:
        """Begin each technique whose offset has come."""
        for technique, offset in self.offsets.items():
            if (self.training_steps >= offset) != (technique in self.begun):
                self._switch(technique)
        if self.pruner is not None:
            self.pruner.step(self.training_steps)

    def _switch(self, technique: str) -> None:
        """On, where its time has come; off again, where an earlier checkpoint was loaded."""
        self.begun ^= {technique}
        on = technique in self.begun
        if technique == "weight_quantization":
            self.weight_quantization_enabled = on
        chosen = [layer for layer in self.layers.values() if _is_prepared(layer, technique)]
        for layer in chosen:
            setattr(layer, f"{technique}_enabled", on)
        word = "begins" if on else "ends"
        log_dist(f"{technique} of {len(chosen)} layers {word} at step {self.training_steps}", [0])


def _is_prepared(layer: Any, technique: str) -> bool:
    if technique == "weight_quantization":
        return hasattr(layer, f"{technique}_enabled") and hasattr(layer.weight, "target_bits")
    return getattr(layer, f"{technique}_method", None) is not None
