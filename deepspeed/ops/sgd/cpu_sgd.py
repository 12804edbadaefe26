# SPDX-License-Identifier: Apache-2.0
"""`DeepSpeedCPUSGD`: SGD with momentum for params in the CPU's memory, on the native kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from deepspeed.ops.elementwise import ElementwiseOptimizer
from deepspeed.ops.rules import sgd_step
from deepspeed.utils.errors import explain


class DeepSpeedCPUSGD(ElementwiseOptimizer):
    """SGD for params in the CPU's memory: the rule and the state of `torch.optim.SGD`.

    Args:
        model_params: params, named params or param groups.
        lr: learning rate.
        momentum: decay rate of the momentum; without it no state is kept.
        dampening: the momentum takes in ``1 - dampening`` of each gradient.
        weight_decay: added to the gradient.
        nesterov: Nesterov's momentum.
        fp32_optimizer_states: keep an fp32 momentum for 16-bit params; else one of the param's dtype.

    Raises:
        ValueError: Nesterov's momentum without momentum or with dampening.
        AssertionError: at the step, when a param is not in the CPU's memory.
    """

    host_only = True
    moments = ("momentum_buffer",)

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                explain(
                    "Nesterov's momentum needs a momentum and no dampening",
                    got=f"momentum={momentum}, dampening={dampening}",
                )
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(model_params, defaults, fp32_optimizer_states)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, also one of torch's SGD, which counts no steps."""
        super().load_state_dict(state_dict)
        for param, state in list(self.state.items()):
            if state.get("momentum_buffer") is None:
                state.pop("momentum_buffer", None)
                if "step" not in state:
                    del self.state[param]
                    continue
            state.setdefault("step", 1)

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0  # the buffer is made by the first step that needs it, whichever that is

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
            raise RuntimeError("DeepSpeedCPUSGD takes no sparse gradients.")
        state["step"] += 1
        first = state["step"] == 1
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"], first = self._new_moment(param), True
        sgd_step(
            param.detach(),
            state.get("momentum_buffer"),
            grad,
            low,
            float(group["lr"]),
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            first,
            grad_scale,
        )
