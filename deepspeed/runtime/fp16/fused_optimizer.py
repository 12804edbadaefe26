# SPDX-License-Identifier: Apache-2.0
"""Stage 0 over an fp16 or bf16 model with a fused optimizer, under the name that callers know."""

from __future__ import annotations

from typing import Any

import torch

from ..zero import state
from .stage_0 import StageZeroOptimizer


class FP16_Optimizer(StageZeroOptimizer):
    """Stage 0 over an fp16 or bf16 model with a fused optimizer; see `ZeroOptimizer`."""

    saves_flat = True
    """Its checkpoints hold flat masters rather than one tensor a parameter."""

    @property
    def fp32_groups_flat(self) -> list[torch.Tensor]:
        """The fp32 masters of each group, one flat tensor."""
        return state.flat_masters(self)

    def unscale_and_clip_grads(
        self, grad_groups_flat: Any, total_norm: float, apply_scale: bool = True
    ) -> float:
        """What gradients with a norm of `total_norm`, still scaled, are divided by; the step applies it."""
        return super()._combined_scale(total_norm, self.loss_scale)

    def _combined_scale(self, norm: float, scale: float) -> float:
        return self.unscale_and_clip_grads([group.grads() for group in self.groups], norm)
