# SPDX-License-Identifier: Apache-2.0
"""Stage 0 over an fp16 or bf16 model: what its two wrappers have in common."""

from __future__ import annotations

from typing import Any

import torch

from ..zero.optimizer import ZeroOptimizer
from .loss_scaler import LossScaleConfig


class StageZeroOptimizer(ZeroOptimizer):
    """Stage 0 over an fp16 or bf16 model; see `ZeroOptimizer`."""

    @property
    def loss_scale_config(self) -> LossScaleConfig:
        """How the loss is scaled now."""
        return LossScaleConfig.of(self.loss_scaler)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step, with what the caller assigned to `.grad` since the backward pass in place of what that gave.

        Raises:
            RuntimeError, FloatingPointError: see `ZeroOptimizer.step`.
        """
        self.reducer.reduce_left_over()
        for group in self.groups:
            for index, param in enumerate(group.params):
                if param.grad is not None:
                    group.set_param_grad(index, param.grad)
                    param.grad = None
        super().step(closure)
