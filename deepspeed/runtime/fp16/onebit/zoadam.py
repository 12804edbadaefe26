# SPDX-License-Identifier: Apache-2.0
"""0/1 Adam (arXiv:2202.06009): no full-precision phase, and fewer exchanges the longer training goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.utils.errors import explain

from .base import CompressingOptimizer, descend, direction


class ZeroOneAdam(CompressingOptimizer):
    """Adam whose variance is updated ever more rarely, then never, when ranks also step on their own in between.

    Up to `var_freeze_step`, gradients are averaged in full in the steps that update the variance, and as one bit an element
    in all others; the distance of the former doubles every `var_update_scaler` updates. After it, ranks take steps with
    their own momentum and average what they did every so many steps, one bit an element; that distance doubles every
    `local_step_scaler` steps, up to `local_step_clipper`. Between exchanges the ranks' weights differ.

    Args:
        params: params or param groups.
        deepspeed: the engine, whose ranks average; the engine that gets the optimizer sees to it itself.
        lr: learning rate.
        bias_correction: Adam's correction of both moments while the variance moves.
        betas: decay rates of the moments.
        eps: added to the root of the variance.
        eps_inside_sqrt: add it to the variance.
        weight_decay: decoupled decay.
        max_grad_norm: must be 0; use `gradient_clipping`.
        var_freeze_step: last step that may update the variance.
        var_update_scaler, local_step_scaler, local_step_clipper: see above.
        amsgrad: must be False.
        cuda_aware, comm_backend_name: kept for callers; the engine's process group is used.

    Raises:
        ValueError: for `max_grad_norm`, and for a scaler or clipper below 1.
        RuntimeError: for `amsgrad`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        deepspeed: Any = None,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        var_freeze_step: int = 100000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32678,
        local_step_clipper: int = 16,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        counts = {
            "var_update_scaler": var_update_scaler,
            "local_step_scaler": local_step_scaler,
            "local_step_clipper": local_step_clipper,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(explain(f"{name} counts steps", got=count, expected="1 or more"))
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, deepspeed, max_grad_norm, amsgrad, comm_backend_name)
        self.var_freeze_step, self.var_update_scaler = var_freeze_step, var_update_scaler
        self.local_step_scaler, self.local_step_clipper = local_step_scaler, local_step_clipper

    @property
    def freeze_key(self) -> bool:
        """Whether the variance has settled."""
        return self._steps() >= self.var_freeze_step

    def variance_steps(self, step: int) -> tuple[int, int]:
        """The last step up to `step` that updates the variance, 0 for none, and how many of them do."""
        last, count, distance = 0, 0, 1
        until = min(step, self.var_freeze_step)
        while True:
            # Updates of one distance: the next `var_update_scaler` multiples of it.
            first = (last // distance + 1) * distance
            end = min(until, first + (self.var_update_scaler - 1) * distance)
            if end < first:
                return last, count
            more = (end - first) // distance
            last, count, distance = first + more * distance, count + more + 1, distance * 2

    def exchange_distance(self, step: int) -> int:
        """Steps from one exchange to the next, after the variance has settled."""
        doubled = max(0, step - 1 - self.var_freeze_step) // self.local_step_scaler
        return min(self.local_step_clipper, 2 ** min(doubled, 62))

    def _local_next(self, steps: int) -> bool:
        return self.variance_steps(steps + 1)[0] != steps + 1

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        super()._init_state(param, state)
        state["momentum_accumulator"] = torch.zeros_like(state["exp_avg"])
        state["lrs"] = 0.0

    def _step_param(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        last, updates = self.variance_steps(state["step"])
        if state["step"] > self.var_freeze_step:
            if state["step"] == self.var_freeze_step + 1:
                # of gradients, which are of another size than what travels now
                self._errors.pop(param, None)
            state["exp_avg"].lerp_(grad, 1 - beta1)
            self._step_alone(group, param, state, updates)
            return
        if last == state["step"]:
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        else:
            grad = grad.clone()
            self._mean_(param, grad, group)
        state["exp_avg"].lerp_(grad, 1 - beta1)
        descend(param, direction(state, group, updates), group)

    def _step_alone(
        self, group: dict[str, Any], param: Tensor, state: dict[str, Any], updates: int
    ) -> None:
        """One step with the rank's own momentum; where an exchange is due, all steps since the last are made common.

        They are then taken once more from where the last exchange left off, so that ranks agree to the bit.
        """
        done, lr = state["momentum_accumulator"], float(group["lr"])
        if not state["lrs"]:
            state["anchor"] = param.detach().clone()
        done.add_(state["exp_avg"], alpha=lr)
        state["lrs"] += lr
        if state["step"] % self.exchange_distance(state["step"]):
            descend(param, direction(state, group, updates), group)
            return
        self._mean_(param, done, group)
        whole = direction({**state, "exp_avg": done}, group, updates)
        param.copy_(state["anchor"] * (1 - state["lrs"] * group["weight_decay"]) - whole)
        if state["lrs"]:
            state["exp_avg"].copy_(done / state["lrs"])
        done.zero_()
        state["lrs"] = 0.0
