# SPDX-License-Identifier: Apache-2.0
"""`DeepSpeedCPUAdagrad`: Adagrad for params in the CPU's memory, with sparse gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from deepspeed.ops.elementwise import ElementwiseOptimizer
from deepspeed.ops.rules import adagrad_step
from deepspeed.utils.logging import logger


class DeepSpeedCPUAdagrad(ElementwiseOptimizer):
    """Adagrad for params in the CPU's memory; a sparse gradient updates the rows it names.

    Args:
        model_params: params, named params or param groups.
        lr: learning rate.
        eps: added to the root of the summed squares.
        weight_decay: added to the gradient; with sparse gradients, in the rows they name.
        amsgrad: accepted for compatibility and not used.
        fp32_optimizer_states: keep an fp32 sum for 16-bit params; else one of the param's dtype.

    Raises:
        AssertionError: at the step, when a param is not in the CPU's memory.
    """

    host_only = True
    moments = ("exp_avg_sq",)

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if amsgrad:
            logger.warning("DeepSpeedCPUAdagrad has no AMSGrad variant: amsgrad=True has no effect")
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
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
        state["step"] += 1
        rule = (float(group["lr"]), group["eps"], group["weight_decay"], grad_scale)
        target, sums = param.detach(), state["exp_avg_sq"]
        if not grad.is_sparse:
            adagrad_step(target, sums, grad, low, *rule)
            return
        # Equal indices must be summed first: the rule is not linear.
        grad = grad.coalesce()
        where = tuple(grad.indices())
        rows, row_sums = target[where], sums[where]
        adagrad_step(rows, row_sums, grad.values(), None, *rule)
        target.index_put_(where, rows)
        sums.index_put_(where, row_sums)
        if low is not None:
            low.copy_(target)
