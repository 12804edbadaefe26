# SPDX-License-Identifier: Apache-2.0
"""`DeepSpeedCPULion`: Lion for params in the CPU's memory, on the native kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from deepspeed.ops.elementwise import ElementwiseOptimizer
from deepspeed.ops.rules import lion_step


class DeepSpeedCPULion(ElementwiseOptimizer):
    """Lion for params in the CPU's memory: steps along the sign of an interpolated momentum.

    Args:
        model_params: params, named params or param groups.
        lr: learning rate, the size of each element's move.
        betas: weight of the momentum in the direction, and its decay rate.
        weight_decay: decay of the params, decoupled from the gradient.
        fp32_optimizer_states: keep an fp32 momentum for 16-bit params; else one of the param's dtype.

    Raises:
        AssertionError: at the step, when a param is not in the CPU's memory.
    """

    host_only = True
    moments = ("exp_avg",)

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(model_params, defaults, fp32_optimizer_states)

    def _apply(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        low: Tensor | None,
        grad_scale: float,
    ) -> None:
        apply_lion(group, param, grad, state, low, grad_scale)


def apply_lion(
    group: dict[str, Any],
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    low: Tensor | None,
    grad_scale: float,
) -> None:
    """Count the step and run the op with the group's hyperparameters."""
    beta1, beta2 = group["betas"]
    state["step"] += 1
    lion_step(
        param.detach(),
        state["exp_avg"],
        grad,
        low,
        float(group["lr"]),
        beta1,
        beta2,
        group["weight_decay"],
        grad_scale,
    )
