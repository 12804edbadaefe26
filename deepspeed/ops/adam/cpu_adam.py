# SPDX-License-Identifier: Apache-2.0
"""`DeepSpeedCPUAdam`: Adam and AdamW for params in the CPU's memory, on the native kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepspeed.ops.elementwise import ElementwiseOptimizer, require_cpu
from deepspeed.ops.rules import adam_rollback, adam_step, random_adam_step
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger


class DeepSpeedCPUAdam(ElementwiseOptimizer):
    """Adam (AdamW by default) for params in the CPU's memory.

    Args:
        model_params: params, named params or param groups.
        lr: learning rate.
        bias_correction: divide the moments by ``1 - beta**step``.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decay of the params.
        amsgrad: accepted for compatibility and not used.
        adamw_mode: decay the params directly (AdamW); else add the decay to the gradient (L2).
        fp32_optimizer_states: keep fp32 moments for 16-bit params; else moments of the param's dtype.
        stochastic_rounding: round bf16 params, and bf16 moments, up with the probability of what is cut off, so that
            small steps add up without an fp32 master copy. Seeded by `torch.initial_seed()` when the optimizer is made.

    Raises:
        AssertionError: at the step, when a param is not in the CPU's memory.
        TypeError: at the step, stochastic rounding of params that are not bf16.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> optimizer = DeepSpeedCPUAdam(layer.parameters(), lr=1e-3)
        >>> layer(torch.ones(2)).sum().backward()
        >>> optimizer.step()
    """

    # Number of optimizers made so far; each takes one as its opt_id.
    optimizer_id: ClassVar[int] = 0
    host_only = True
    moments = ("exp_avg", "exp_avg_sq")
    settings = ("fp32_optimizer_states", "adam_w_mode", "stochastic_rounding", "_seed")

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "amsgrad": amsgrad,
        }
        if amsgrad:
            logger.warning("DeepSpeedCPUAdam has no AMSGrad variant: amsgrad=True has no effect")
        self.adam_w_mode = adamw_mode
        self.stochastic_rounding = stochastic_rounding
        self._seed = torch.initial_seed()
        self._at = (0, 0)  # the step that the last seed was for, and how many it has had
        self._take_id()
        super().__init__(model_params, defaults, fp32_optimizer_states)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"stochastic_rounding": False, "_seed": 0, **state})
        self._at = (0, 0)
        self._take_id()

    def _take_id(self) -> None:
        self.opt_id = DeepSpeedCPUAdam.optimizer_id
        DeepSpeedCPUAdam.optimizer_id += 1

    @torch.no_grad()
    def step_subgroup(self, subgroup_id: int, closure: Callable[[], Any] | None = None) -> Any:
        """Step the param that stands in the groups now, with the state of that number; returns the closure's value.

        A caller with too many states for its memory puts one flat param after the other into the same group.

        Raises:
            ValueError: several params have gradients, or the state is of another size.
        """
        loss = closure() if closure is not None else None
        for group, param in self._stepped(subgroup_id):
            state = self.state[subgroup_id]  # type: ignore[index]
            if not state:
                self._init_state(param, state)
            self._check_size(subgroup_id, param, state)
            self._apply(group, param, param.grad, state, None, 1.0)
            torch.autograd.graph.increment_version(param)
        return loss

    @torch.no_grad()
    def rollback_subgroup(self, subgroup_id: int, closure: Callable[[], Any] | None = None) -> Any:
        """Take back the last `step_subgroup` of that number, given the same gradient; returns the closure's value.

        Raises:
            RuntimeError: it has made no step.
            ValueError: as `step_subgroup`.
        """
        loss = closure() if closure is not None else None
        state = self.state.get(subgroup_id)  # type: ignore[call-overload]
        if not state:
            raise RuntimeError(
                explain(
                    f"Cannot rollback optimizer state for sub_group_id {subgroup_id}",
                    got="no state of that number",
                    expected="one that step_subgroup has made",
                )
            )
        if state["step"] == 0:
            raise RuntimeError(
                f"Cannot rollback sub_group_id {subgroup_id}: step count is 0, nothing is left to take back"
            )
        for group, param in self._stepped(subgroup_id):
            self._check_size(subgroup_id, param, state)
            adam_rollback(*self._arguments(group, param, param.grad, state, None, 1.0))
            torch.autograd.graph.increment_version(param)
            state["step"] -= 1
        return loss

    def _stepped(self, subgroup_id: int) -> list[tuple[dict[str, Any], Tensor]]:
        found = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if len(found) > 1:
            raise ValueError(
                explain(
                    f"subgroup {subgroup_id} is more than one param",
                    got=f"{len(found)} params with gradients",
                    expected="one flat param in the groups at a time",
                )
            )
        for _, param in found:
            require_cpu(param, "DeepSpeedCPUAdam")
        return found

    @staticmethod
    def _check_size(subgroup_id: int, param: Tensor, state: dict[str, Any]) -> None:
        if state["exp_avg"].numel() != param.numel():
            raise ValueError(
                explain(
                    f"the state of subgroup {subgroup_id} is of another size",
                    got=f"{state['exp_avg'].numel()} elements",
                    expected=f"{param.numel()}",
                    fix="Give each flat param a number of its own.",
                )
            )

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
        arguments = self._arguments(group, param, grad, state, low, grad_scale)
        if not self.stochastic_rounding:
            adam_step(*arguments)
            return
        tensors, rule = arguments[:4], arguments[5:]
        random_adam_step(*tensors, *rule, self._next_seed(state["step"]))
        if low is not None:
            low.copy_(param.detach())

    def _next_seed(self, step: int) -> int:
        """A seed for each call of each step, the same after a restart that loads the step."""
        last, count = self._at
        count = count + 1 if last == step else 0
        self._at = (step, count)
        # Far apart: consecutive seeds would give neighbouring elements each other's bits.
        return (self._seed + 0x632BE59BD9B4E019 * (step * 65537 + count)) % (1 << 63)

    def _arguments(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        low: Tensor | None,
        grad_scale: float,
    ) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return (
            param.detach(),
            state["exp_avg"],
            state["exp_avg_sq"],
            grad,
            low,
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            state["step"],
            self.adam_w_mode,
            bool(group["bias_correction"]),
            grad_scale,
        )
