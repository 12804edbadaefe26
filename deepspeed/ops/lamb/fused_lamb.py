# SPDX-License-Identifier: Apache-2.0
"""`FusedLamb`: LAMB, Adam whose step is scaled to the norm of each param, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.ops import cuda, cuda_optim, lamb_rule


class FusedLamb(torch.optim.Optimizer):
    """LAMB for params on any device.

    Args:
        params: params, named params or param groups.
        lr: learning rate.
        bias_correction: scale the step by ``sqrt(1 - beta2**t) / (1 - beta1**t)``.
        betas: decay rates of the first and second moment.
        eps: added to the second moment or to its root.
        eps_inside_sqrt: add eps before the root is taken.
        weight_decay: decay of the params, part of the update whose norm is compared.
        max_grad_norm: gradients with a larger global norm (per group) are scaled down; 0 turns it off.
        max_coeff: greatest ratio of norms.
        min_coeff: least ratio of norms.
        amsgrad: must be False.

    Raises:
        RuntimeError: ``amsgrad`` is asked for; at the step, a gradient is sparse.
    """

    per_param = True
    """Norms are of parameters: the engine keeps each in a flat tensor of its own."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedLamb has no AMSGrad variant: construct it with amsgrad=False.")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        self.eps_mode = 0 if eps_inside_sqrt else 1
        self.lamb_coeffs: list[float] = []
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every param that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        coefficients = []
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            scale = _clip_scale([param.grad for param in params], group["max_grad_norm"])
            together = self._step_together(group, params, scale)
            if together is not None:
                coefficients.append(together)
            else:
                coefficients += [self._step_param(group, param, scale) for param in params]
        self.lamb_coeffs = torch.cat(coefficients).tolist() if coefficients else []
        return loss

    def get_lamb_coeffs(self) -> list[float]:
        """Return the ratio of norms that each param was stepped with last."""
        return self.lamb_coeffs

    def _step_together(
        self, group: dict[str, Any], params: list[Tensor], scale: float | Tensor
    ) -> Tensor | None:
        """Step all params of a group in one go of kernels; returns their ratios, or None if not served."""
        if not params or not all(cuda.on_device(param) for param in params):
            return None
        states = [self._state_of(param) for param in params]
        steps = {state["step"] for state in states}
        alike = len(steps) == 1 and len({param.device for param in params}) == 1
        if not alike or any(param.grad.is_sparse for param in params):
            return None
        bounds = (group["min_coeff"], group["max_coeff"])
        step, inside = steps.pop() + 1, self.eps_mode == 0
        numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], step)
        rule = cuda_optim.LambRule(*numbers, *bounds, inside, bool(group["bias_correction"]))
        factor = torch.as_tensor(1.0 / scale, dtype=torch.float32, device=params[0].device)
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        lists = cuda_optim.TensorLists(
            [param.detach() for param in params], [param.grad for param in params], *moments
        )
        ratios = cuda_optim.multi_tensor_lamb(lists, rule, cuda_optim.Gradients(1.0, factor))
        if ratios is None:
            return None
        for param, state in zip(params, states, strict=True):
            state["step"] = step
            torch.autograd.graph.increment_version(param)
        return ratios

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state.update(
                step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param)
            )
        return state

    def _step_param(self, group: dict[str, Any], param: Tensor, scale: float | Tensor) -> Tensor:
        if param.grad.is_sparse:
            raise RuntimeError("FusedLamb takes no sparse gradients.")
        state = self._state_of(param)
        state["step"] += 1
        ratio = lamb_step(
            param,
            None,
            state["exp_avg"],
            state["exp_avg_sq"],
            param.grad,
            group["lr"],
            *group["betas"],
            group["max_coeff"],
            group["min_coeff"],
            group["eps"],
            scale,
            state["step"],
            self.eps_mode,
            group["bias_correction"],
            group["weight_decay"],
        )
        torch.autograd.graph.increment_version(param)
        return ratio

    def __getstate__(self) -> dict[str, Any]:
        mine = {"eps_mode": self.eps_mode, "lamb_coeffs": self.lamb_coeffs}
        return {**super().__getstate__(), **mine}


def lamb_step(
    param: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    max_coeff: float,
    min_coeff: float,
    eps: float,
    grad_scale: float | Tensor,
    step: int,
    mode: int,
    bias_correction: bool,
    decay: float,
) -> Tensor:
    """Make one LAMB step in place; returns the ratio of norms, a tensor of one element.

    ``grad / grad_scale`` is the gradient used; mode 0 adds eps inside the root; `low` may have no elements.
    """
    if param.is_cpu:
        factor = 1.0 / float(grad_scale)
        run = lamb_rule.lamb_step
    else:
        factor = 1.0 / grad_scale  # a tensor stays on its device
        run = lamb_rule.lamb_step.reference
    return run(
        param.detach(),
        exp_avg,
        exp_avg_sq,
        grad,
        low,
        float(lr),
        beta1,
        beta2,
        eps,
        decay,
        step,
        mode == 0,
        bool(bias_correction),
        min_coeff,
        max_coeff,
        factor,
    )


def _clip_scale(grads: list[Tensor], limit: float) -> float | Tensor:
    """Return what the gradients are to be divided by so that their common norm is at most `limit`."""
    if limit <= 0 or not grads:
        return 1.0
    norm = torch.stack([grad.float().norm() for grad in grads]).norm()
    return (norm / limit).clamp(min=1.0)
