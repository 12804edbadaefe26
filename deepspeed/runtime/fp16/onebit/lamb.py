# SPDX-License-Identifier: Apache-2.0
"""1-bit LAMB (arXiv:2104.06069): 1-bit Adam's communication under LAMB's ratio of norms for each parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import CompressingOptimizer, direction


class OnebitLamb(CompressingOptimizer):
    """LAMB for `freeze_step` steps; from then on ranks average momentum, one bit an element, not gradients.

    The ratio of norms that the first phase arrived at (a running mean) is kept then, and scaled by how much smaller the
    variance would be if it went on: that is reconstructed from the averaged momentum.

    Args:
        params: params or param groups; empty params are left out.
        deepspeed: the engine, whose ranks average; the engine that gets the optimizer sees to it itself.
        lr: learning rate.
        freeze_step: steps with full communication.
        bias_correction: Adam's correction of both moments; the variance's stays as it was when that settled.
        betas: decay rates of the moments.
        eps: added to the root of the variance.
        eps_inside_sqrt: add it to the variance.
        weight_decay: decay, part of the update whose norm is compared.
        max_grad_norm: must be 0; use `gradient_clipping`.
        max_coeff, min_coeff: bounds of the ratio in the first phase.
        amsgrad: must be False.
        cuda_aware, comm_backend_name: kept for callers; the engine's process group is used.
        coeff_beta: decay rate of the running mean of ratios.
        factor_max, factor_min: bounds of the scale of the second phase.
        factor_threshold: by how much, relatively, that may change in a step.

    Raises:
        ValueError: for `max_grad_norm`.
        RuntimeError: for `amsgrad`.
    """

    per_param = True
    """Norms are of parameters: the engine keeps each in a flat tensor of its own."""

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
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults, deepspeed, max_grad_norm, amsgrad, comm_backend_name)
        self.freeze_step, self.coeff_beta = freeze_step, coeff_beta
        self.factor_max, self.factor_min = factor_max, factor_min
        self.factor_threshold = factor_threshold
        self.lamb_coeffs: list[Tensor] = []

    def get_lamb_coeffs(self) -> list[Tensor]:
        """The ratios that each parameter was stepped with last, one 0-dim tensor each."""
        return list(self.lamb_coeffs)

    @property
    def lamb_freeze_key(self) -> bool:
        """Whether the variance has settled."""
        return self._local_next(self._steps())

    def _local_next(self, steps: int) -> bool:
        return steps >= self.freeze_step

    def _begin_step(self) -> None:
        self.lamb_coeffs = []

    def _end_step(self) -> None:
        if self._steps() == self.freeze_step:
            self._compare_momenta()

    def _compare_momenta(self) -> None:
        """Note how far each parameter's momentum is from their mean size.

        Implementations that compress all of them as one tensor even them out by it; here each has scales of its own,
        and the number is for those who read it.
        """
        sizes = {
            id(s): s["exp_avg"].norm().item() / s["exp_avg"].numel() ** 0.5
            for s in self.state.values()
        }
        mean = sum(sizes.values()) / len(sizes)
        for state in self.state.values():
            size = sizes[id(state)]
            state["scaling_coeff"] = mean / size if size else 1.0

    def after_load(self) -> None:
        """Begin anew what is not in a checkpoint, and the ratios where the variance is to settle once more."""
        super().after_load()
        for state in self.state.values() if not self.lamb_freeze_key else ():
            if state.pop("scaling_coeff", None) is not None:
                state["lamb_coeff_freeze"], state["last_factor"] = 0.0, 1.0

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        super()._init_state(param, state)
        state["exp_avg_sq_fresh"] = torch.zeros_like(state["exp_avg_sq"])
        state["lamb_coeff_freeze"], state["last_factor"] = 0.0, 1.0

    def _step_param(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        if state["step"] > self.freeze_step:
            coefficient, update = self._settled(group, param, grad, state)
        else:
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            update = direction(state, group, state["step"])
            update.add_(param, alpha=group["weight_decay"])
            coefficient = _ratio(param, update, group)
            kept = state["lamb_coeff_freeze"]
            if coefficient != 1.0:
                kept = self.coeff_beta * kept + (1 - self.coeff_beta) * coefficient
            state["lamb_coeff_freeze"] = kept
            if state["step"] == self.freeze_step:
                state["exp_avg_sq_fresh"].copy_(state["exp_avg_sq"])
        self.lamb_coeffs.append(torch.tensor(coefficient, device="cpu"))
        param.add_(update.to(param.dtype), alpha=-group["lr"] * coefficient)

    def _settled(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> tuple[float, Tensor]:
        """Ratio and update of a step after the first phase."""
        beta1, beta2 = group["betas"]
        momentum, fresh = state["exp_avg"], state["exp_avg_sq_fresh"]
        before = momentum.clone()
        momentum.lerp_(grad, 1 - beta1)
        self._mean_(param, momentum, group)
        averaged = (momentum - before * beta1).div_(1 - beta1)
        fresh.mul_(beta2).addcmul_(averaged, averaged, value=1 - beta2)
        plain = direction(state, group, self.freeze_step)
        update = plain.add(param, alpha=group["weight_decay"])
        factor = _largest_ratio(state["exp_avg_sq"], fresh, group["eps"])
        if group["weight_decay"] and (size := update.norm().item()):
            share = min(1.0, plain.norm().item() / size)
            factor = factor * share + 1 - share
        factor = min(max(factor, self.factor_min), self.factor_max)
        last, most = state["last_factor"], self.factor_threshold
        factor = min(max(factor, last * (1 - most)), last * (1 + most))
        state["last_factor"] = factor
        return state["lamb_coeff_freeze"] * factor, update


def _ratio(param: Tensor, update: Tensor, group: dict[str, Any]) -> float:
    ours, its = param.norm().item(), update.norm().item()
    if not (ours > 0 and its > 0):
        return 1.0
    return min(max(ours / its, group["min_coeff"]), group["max_coeff"])


def _largest_ratio(old: Tensor, fresh: Tensor, eps: float) -> float:
    """How many times larger the settled variance's root is than the fresh one's, where it is largest."""
    ratios = (old.sqrt() + eps) / (fresh.sqrt() + eps)
    ratios = ratios.masked_fill(old == 0, 0.0)  # never had a gradient
    return ratios.max().item() or 1.0
