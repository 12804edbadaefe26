# SPDX-License-Identifier: Apache-2.0
"""Stage 0 over an fp16 or bf16 model: what its two wrappers have in common."""

from __future__ import annotations

from typing import Any

import torch

from ..zero.optimizer import ZeroOptimizer
from ..zero.shard_group import ShardGroup
from .loss_scaler import LossScaleConfig


class StageZeroOptimizer(ZeroOptimizer):
    """Stage 0 over an fp16 or bf16 model; see `ZeroOptimizer`.

    Between a backward pass and the step each parameter's `.grad` is a view of where its gradient adds up. It may be
    edited, replaced, or set to None, which forgets it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shown: list[tuple[ShardGroup, int, torch.Tensor]] = []
        self.reducer.before_pass, self.reducer.after_pass = self._take_back, self._show

    def _show(self) -> None:
        for group in self.groups:
            for index, param in enumerate(group.params):
                if param.grad is None and (view := group.view_param_grad(index)) is not None:
                    param.grad = view
                    self._shown.append((group, index, view))

    @torch.no_grad()
    def _take_back(self) -> None:
        """Before gradients add up in the slab: autograd must not add to what is there already."""
        shown, self._shown = self._shown, []
        for group, index, view in shown:
            param = group.params[index]
            grad = param.grad
            if grad is None:
                group.forget_param_grad(index)
            elif grad is not view:
                group.set_param_grad(index, grad)
            param.grad = None

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
        self._take_back()
        for group in self.groups:
            for index, param in enumerate(group.params):
                if param.grad is not None:
                    group.set_param_grad(index, param.grad)
                    param.grad = None
        super().step(closure)
