# SPDX-License-Identifier: Apache-2.0
"""1-bit Adam (arXiv:2102.02888): after some steps the variance stays as it is, and momentum travels as signs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .base import CompressingOptimizer, descend, direction


class OnebitAdam(CompressingOptimizer):
    """Adam for `freeze_step` steps; from then on ranks average momentum, one bit an element, not gradients.

    Args:
        params: params or param groups.
        deepspeed: the engine, whose ranks average; the engine that gets the optimizer sees to it itself.
        lr: learning rate.
        freeze_step: steps with full communication.
        bias_correction: Adam's correction of both moments; the variance's stays as it was when that settled.
        betas: decay rates of the moments.
        eps: added to the root of the variance.
        eps_inside_sqrt: add it to the variance.
        weight_decay: decoupled decay.
        max_grad_norm: must be 0; use `gradient_clipping`.
        amsgrad: must be False.
        cuda_aware, comm_backend_name: kept for callers; the engine's process group is used.

    Raises:
        ValueError: for `max_grad_norm`.
        RuntimeError: for `amsgrad`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        deepspeed: Any = None,
        lr: float = 1e-3,
        freeze_step: int = 100000,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, deepspeed, max_grad_norm, amsgrad, comm_backend_name)
        self.freeze_step = freeze_step

    @property
    def adam_freeze_key(self) -> bool:
        """Whether the variance has settled."""
        return self._local_next(self._steps())

    def _local_next(self, steps: int) -> bool:
        return steps >= self.freeze_step

    def _step_param(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        if state["step"] <= self.freeze_step:
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        else:
            self._mean_(param, state["exp_avg"], group)
        descend(param, direction(state, group, min(state["step"], self.freeze_step)), group)
