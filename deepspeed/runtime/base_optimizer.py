# SPDX-License-Identifier: Apache-2.0
"""The types by which callers recognise our optimizer wrappers."""

from __future__ import annotations


class DeepSpeedOptimizer:
    """Any optimizer that `deepspeed.initialize` returns instead of the user's own."""

    def needs_scaler(self) -> bool:
        """Whether a loss has to go through `engine.scale` before a backward pass of the caller's own."""
        return getattr(self, "dynamic_loss_scale", False) or getattr(self, "loss_scale", 1.0) != 1.0


class ZeROOptimizer(DeepSpeedOptimizer):
    """A DeepSpeedOptimizer that shards its states over the data-parallel ranks (ZeRO stages 1 to 3)."""
