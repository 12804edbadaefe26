# SPDX-License-Identifier: Apache-2.0
"""What the optimizers with compressed communication share: the ranks, the errors of compression, and one loop.

[Note: Who reduces]
    While `reduces_itself` is true the engine leaves gradients as each rank has them, and the optimizer averages what it
    sends. The answer follows from the step counts in its state, so it is right after a checkpoint was loaded, too. Errors
    of compression are not part of the state: they belong to a rank and are small, and a load begins with none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.comm.mesh import Axis
from deepspeed.runtime.comm.compressed import compressed_mean_, error_sizes
from deepspeed.utils.errors import explain


class CompressingOptimizer(torch.optim.Optimizer):
    """Base of 1-bit Adam, 0/1 Adam and 1-bit LAMB: all but the rule.

    Args:
        params: params or param groups; empty ones are left out. A group may have `exp_avg_mask`, a tensor of zeros and ones
            by which momentum is multiplied after each exchange: elements whose gradient is zero on all ranks would
            otherwise get momentum from rounding to signs.
        defaults: options of the groups.
        deepspeed: an engine, whose ranks average; None: nobody does until `join`.
        max_grad_norm: must be 0: the engine's own clipping stands for it.
        amsgrad: must be False.
        comm_backend_name: kept for callers.

    Raises:
        ValueError: for `max_grad_norm`.
        RuntimeError: for `amsgrad`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        deepspeed: Any,
        max_grad_norm: float,
        amsgrad: bool,
        comm_backend_name: str,
    ) -> None:
        if max_grad_norm:
            raise ValueError(
                explain(
                    "max_grad_norm is not clipped by",
                    got=max_grad_norm,
                    fix="set gradient_clipping in the configuration",
                )
            )
        if amsgrad:
            raise RuntimeError(f"{type(self).__name__} has no AMSGrad variant: leave amsgrad out.")
        super().__init__(_without_empty(params), defaults)
        mesh = getattr(deepspeed, "mesh", None)
        self.axis = Axis.alone() if mesh is None else mesh.sequence_data
        self.comm_backend_name = comm_backend_name
        self._errors: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}

    def join(self, axis: Axis) -> None:
        """Average over these ranks from now on."""
        self.axis = axis
        self._errors.clear()

    @property
    def reduces_itself(self) -> bool:
        """Whether the next step takes gradients that are not averaged over the ranks."""
        return self.axis.size > 1 and self._local_next(self._steps())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter; a collective of the ranks. Returns the closure's value.

        A parameter without a gradient counts as one whose gradient is zero, since other ranks may have one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin_step()
        for group in self.param_groups:
            for param in group["params"]:
                grad = torch.zeros_like(param) if param.grad is None else param.grad
                if grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} takes no sparse gradients.")
                state = self.state[param]
                if "exp_avg" not in state:
                    self._init_state(param, state)
                state["step"] += 1
                self._step_param(group, param, grad.to(state["exp_avg"].dtype), state)
        self._end_step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; errors of compression begin anew."""
        super().load_state_dict(state_dict)
        self.after_load()

    def after_load(self) -> None:
        """Begin anew what is not in a checkpoint; for whoever has put other values into `state`."""
        self._errors.clear()

    @property
    def worker_errors(self) -> list[Tensor]:
        """What this rank's codes have lost, for each parameter that has been compressed."""
        return [errors[1] for errors in self._errors.values()]

    @property
    def server_errors(self) -> list[Tensor]:
        """What the codes of the means that this rank makes have lost, for each parameter."""
        return [errors[2] for errors in self._errors.values()]

    # - for subclasses

    def _local_next(self, steps: int) -> bool:
        """Whether gradients stay local in the step that follows `steps` steps."""
        raise NotImplementedError

    def _step_param(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> None:
        raise NotImplementedError

    def _begin_step(self) -> None:
        """Called before the first parameter."""

    def _end_step(self) -> None:
        """Called after the last parameter."""

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=_wide(param), requires_grad=False)

    def _steps(self) -> int:
        return max((int(state.get("step", 0)) for state in self.state.values()), default=0)

    def _mean_(self, key: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        """Average `values`, of the shape of the group's params or flat, over the ranks, with the errors kept for `key`."""
        if self.axis.size > 1:
            kept = self._errors.get(key)
            if kept is None or kept[0] is not self.state[key]["exp_avg"]:
                sizes = error_sizes(values.numel(), self.axis.size)
                worker, server = (values.new_zeros(size) for size in sizes)
                # The state that they were made beside: a load that replaces it ends them.
                kept = self._errors[key] = (self.state[key]["exp_avg"], worker, server)
            flat = compressed_mean_(values.reshape(-1), kept[1], kept[2], self.axis)
            values.copy_(flat.view_as(values))
            if padding := getattr(key, "ds_padding", 0):  # zero travels as a sign, too
                values[-padding:] = 0
        mask = group.get("exp_avg_mask")
        if mask is not None:
            values.mul_(mask.to(values.device).view_as(values))


def direction(state: dict[str, Any], group: dict[str, Any], settled: int) -> Tensor:
    """Adam's direction from the moments in `state`; `settled` is the last step that changed the variance."""
    beta1, beta2 = group["betas"]
    steps, seen = (state["step"], settled) if group["bias_correction"] else (math.inf, math.inf)
    spread = state["exp_avg_sq"] / (1 - beta2**seen)
    spread = (
        spread.add_(group["eps"]).sqrt_()
        if group["eps_inside_sqrt"]
        else spread.sqrt_().add_(group["eps"])
    )
    return (state["exp_avg"] / (1 - beta1**steps)).div_(spread)


def descend(param: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    """Take `update` and the decay off a parameter."""
    if group["weight_decay"]:
        update = update.add(param, alpha=group["weight_decay"])
    param.add_(update.to(param.dtype), alpha=-group["lr"])


def _wide(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _without_empty(params: Iterable[Any]) -> list[Any]:
    given = list(params)
    if given and isinstance(given[0], dict):
        groups = []
        for group in given:
            held = group["params"]
            held = [held] if isinstance(held, Tensor) else list(held)
            groups.append({**group, "params": [p for p in held if p.numel()]})
        return [group for group in groups if group["params"]]
    return [item for item in given if (item[1] if isinstance(item, tuple) else item).numel()]
