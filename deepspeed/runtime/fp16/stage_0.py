# SPDX-License-Identifier: Apache-2.0
"""Stage 0 over an fp16 or bf16 model: what its two wrappers have in common."""

from __future__ import annotations

from typing import Any

import torch

from ..zero.optimizer import ZeroOptimizer
from ..zero.shard_group import ShardGroup
from .loss_scaler import LossScaleConfig


class StageZeroOptimizer(ZeroOptimizer):
    """Stage 0 over an fp16 or bf16 model; see `ZeroOptimizer`."""

    @property
    def loss_scale_config(self) -> LossScaleConfig:
        """How the loss is scaled now."""
        return LossScaleConfig.of(self.loss_scaler)

    @property
    def low_precision_dtype(self) -> torch.dtype | None:
        """The dtype that the model computes in."""
        return self.precision.compute

    def _build_groups(self) -> list[ShardGroup]:
        groups = super()._build_groups()
        for group in groups:  # for rules that round what they exchange
            group.parts[-1].master.ds_padding = group.padding  # type: ignore[attr-defined]
        return groups

    def load_state_dict(self, *args: Any, **options: Any) -> None:
        """Take over what `state_dict` gave; see `ZeroOptimizer.load_state_dict`."""
        super().load_state_dict(*args, **options)
        begin_anew = getattr(self.optimizer, "after_load", None)
        if begin_anew is not None:
            begin_anew()

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
