# SPDX-License-Identifier: Apache-2.0
"""Stage 0 over an fp16 or bf16 model with any torch optimizer, under the name that callers know."""

from __future__ import annotations

import torch

from ..zero import state
from .stage_0 import StageZeroOptimizer


class FP16_UnfusedOptimizer(StageZeroOptimizer):
    """Stage 0 over an fp16 or bf16 model with any torch optimizer; see `ZeroOptimizer`."""

    @property
    def fp32_groups(self) -> list[list[torch.Tensor]]:
        """The fp32 masters of each group's parameters, in their shapes."""
        return state.masters_by_param(self)

    def unscale_and_clip_grads(self, total_norm: float, apply_scale: bool = True) -> float:
        """What gradients with a norm of `total_norm`, still scaled, are divided by; the step applies it."""
        return super()._combined_scale(total_norm, self.loss_scale)

    def _combined_scale(self, norm: float, scale: float) -> float:
        return self.unscale_and_clip_grads(norm)
