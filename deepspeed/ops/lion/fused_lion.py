# SPDX-License-Identifier: Apache-2.0
"""`FusedLion`: Lion for params on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from deepspeed.ops import cuda_optim
from deepspeed.ops.elementwise import ElementwiseOptimizer
from deepspeed.ops.lion.cpu_lion import apply_lion


class FusedLion(ElementwiseOptimizer):
    """Lion for params on any device; the momentum has the param's dtype.

    An element whose direction is exactly 0 (no gradient yet) stays where it is.

    Args:
        params: params, named params or param groups.
        lr: learning rate, the size of each element's move.
        betas: weight of the momentum in the direction, and its decay rate.
        weight_decay: decay of the params, decoupled from the gradient.
        set_grad_none: `zero_grad` drops the gradients instead of filling them with zeros.
    """

    moments = ("exp_avg",)
    settings = ("fp32_optimizer_states", "set_grad_none")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        self.set_grad_none = set_grad_none
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, fp32_optimizer_states=False)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop or zero the gradients; without an argument as ``set_grad_none`` says."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: Any = None,
        output_params: Any = None,
        scale: Any = None,
        grad_norms: Any = None,
    ) -> Any:
        """Update every param that has a gradient; returns the closure's value.

        Raises:
            RuntimeError: an argument of the older interface is given, or a gradient is sparse.
        """
        if any(given is not None for given in (grads, output_params, scale, grad_norms)):
            raise RuntimeError(
                "FusedLion.step takes no grads, output_params, scale or grad_norms any more: "
                "set .grad of the params and unscale before the step."
            )
        return super().step(closure)

    def _step_together(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        def launch(lists: cuda_optim.TensorLists, step: int) -> bool:
            lr, decay = float(group["lr"]), group["weight_decay"]
            return cuda_optim.multi_tensor_lion(lists, lr, group["betas"], decay)

        return cuda_optim.step_together(self, params, launch)

    def _apply(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        low: Tensor | None,
        grad_scale: float,
    ) -> None:
        if grad.is_sparse:
            raise RuntimeError("FusedLion takes no sparse gradients.")
        apply_lion(group, param, grad, state, low, grad_scale)
