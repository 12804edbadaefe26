# SPDX-License-Identifier: Apache-2.0
"""`MuonWithAuxAdam`: Muon for matrices and AdamW for everything else, on whole parameters or on ZeRO's flat shards.

[Note: Muon over shards]
    Muon's rule is elementwise but for one step in its middle, which needs the whole matrix. ZeRO's shards are cut without
    regard to matrices. So the rule comes in three parts, `direction` (momentum; on any run of elements), `whole_update`
    (of one whole matrix) and `apply` (again on any run), and `whole_params.step_whole` moves directions to one rank a matrix
    and updates back. Gradients are clipped before all this, as for any optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepspeed.ops.rules import adam_step
from deepspeed.utils.errors import explain

from ..own_slice import shape_of
from .newton_schulz import NS_METHODS, NS_STEPS, orthogonalize

MUON_GROUP, ADAM_GROUP = "muon-params", "adam-params"
_MUON_DEFAULTS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "ns_method": "gram"}
_ADAM_DEFAULTS = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}


def momentum_direction(
    grad: Tensor, momentum: Tensor, beta: float = 0.95, nesterov: bool = True
) -> Tensor:
    """Take `grad` (of the momentum's dtype) into the momentum; returns the direction, which may alias either."""
    momentum.lerp_(grad, 1 - beta)
    return grad.lerp_(momentum, beta) if nesterov else momentum


def matrix_update(direction: Tensor, method: str = "gram", steps: int = NS_STEPS) -> Tensor:
    """The orthogonal update of a whole parameter's direction, in its shape and dtype.

    Convolutions' weights count as matrices of their first dimension; three dimensions are a batch of matrices. Tall
    matrices are scaled by the root of rows / columns, so that the change of the layer's output does not depend on shape.
    """
    shape = direction.shape
    matrix = direction.reshape(shape[0], -1) if direction.dim() > 3 else direction
    rows, columns = matrix.shape[-2:]
    update = orthogonalize(matrix, steps, method).to(direction.dtype)
    if rows > columns > 0:
        update = update * (rows / columns) ** 0.5
    return update.reshape(shape)


class MuonWithAuxAdam(torch.optim.Optimizer):
    """Muon on the groups with `use_muon` true, AdamW on those where it is false.

    Args:
        param_groups: dicts with `params` and `use_muon`; Muon's take `lr` (0.02), `momentum` (0.95), `weight_decay` (0) and
            `ns_method` ("gram" or "standard"), the others `lr` (3e-4), `betas` (0.9, 0.95), `eps` (1e-10), `weight_decay` (0).

    Raises:
        ValueError: a group without `use_muon`, with an unknown key or method, or a parameter of fewer than two dimensions
            in one of Muon's groups.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        super().__init__([_completed(group) for group in param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.grad is not None):
                if self.needs_whole(group):
                    direction = self.direction(group, param, param, 0, param.grad, 1.0)
                    self.apply(group, param, self.whole_update(group, direction))
                else:
                    self.step_shard(group, param, param.grad)
        return loss

    def needs_whole(self, group: Mapping[str, Any]) -> bool:
        """Whether the rule of a group looks at whole parameters."""
        return bool(group["use_muon"])

    def direction(
        self,
        group: Mapping[str, Any],
        param: Tensor,
        run: Tensor,
        start: int,
        grad: Tensor,
        grad_scale: float,
    ) -> Tensor:
        """Take a run of gradients into the momentum; returns the direction of that run.

        Args:
            group: the param group.
            param: key of the state: a parameter, or a flat shard of several.
            run: the elements of `param` that `grad` belongs to: all of it, or a flat piece.
            start: where `run` begins in `param`; 0 for all of it.
            grad: gradients of the run's shape, any float dtype.
            grad_scale: the gradient used is ``grad * grad_scale``.
        """
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, requires_grad=False)
        momentum = state["momentum_buffer"]
        if run is not param:
            momentum = momentum.narrow(0, start, run.numel())
        scaled = grad.to(momentum.dtype, copy=True).mul_(grad_scale)
        return momentum_direction(scaled, momentum, group["momentum"])

    def whole_update(self, group: Mapping[str, Any], direction: Tensor) -> Tensor:
        """The update of one whole parameter from its direction.

        Raises:
            RuntimeError: `direction` is flat: a shard came where a parameter belongs.
        """
        if direction.dim() < 2:
            raise RuntimeError(
                explain(
                    "Muon steps whole matrices",
                    got=f"a parameter of shape {tuple(direction.shape)}",
                    expected="two dimensions or more",
                    fix="leave step hooks off this optimizer under ZeRO: they make it see flat shards",
                )
            )
        return matrix_update(direction, group["ns_method"])

    def apply(self, group: Mapping[str, Any], run: Tensor, update: Tensor) -> None:
        """Decay a run of a parameter and take the update off."""
        if group["weight_decay"]:
            run.mul_(1 - group["lr"] * group["weight_decay"])
        run.add_(update.to(run.dtype), alpha=-group["lr"])

    @torch.no_grad()
    def step_shard(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        low: Tensor | None = None,
        grad_scale: float = 1.0,
    ) -> None:
        """One step of AdamW on one parameter, or on one flat shard in its place; see `ElementwiseOptimizer`."""
        state = self.state[param]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, requires_grad=False)
        state["step"] += 1
        moments = (state["exp_avg"], state["exp_avg_sq"])
        rates = (float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])
        adam_step(
            param.detach(), *moments, grad, low, *rates, state["step"], True, True, grad_scale
        )
        torch.autograd.graph.increment_version(param)


def muon_groups(params: Iterable[Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of `MuonWithAuxAdam` by the parameters' `use_muon`, from an `optimizer` section.

    Args:
        params: parameters, `(name, parameter)` pairs, or param groups, whose own values win over the section's.
        options: `lr`, `muon_lr`, `adam_lr`, `momentum`, `weight_decay`, `ns_method`, `betas`, `eps`.

    Raises:
        ValueError: another key.
    """
    known = {*_MUON_DEFAULTS, *_ADAM_DEFAULTS, "muon_lr", "adam_lr"}
    if set(options) - known:
        raise ValueError(
            explain(
                "optimizer.params has keys that Muon does not take",
                got=", ".join(sorted(set(options) - known)),
                expected=", ".join(sorted(known)),
            )
        )
    made = []
    for given in _as_groups(params):
        own = {**options, **{k: v for k, v in given.items() if k in known}}
        trained = [p for p in given["params"] if p.requires_grad]
        for is_muon, name, defaults, rate in (
            (True, MUON_GROUP, _MUON_DEFAULTS, "muon_lr"),
            (False, ADAM_GROUP, _ADAM_DEFAULTS, "adam_lr"),
        ):
            mine = [p for p in trained if bool(getattr(p, "use_muon", False)) is is_muon]
            values = {key: own[key] for key in defaults if key in own}
            if rate in own and (rate in given or "lr" not in given):
                values["lr"] = own[rate]
            if mine:
                made.append({"params": mine, "use_muon": is_muon, "name": name, **values})
    return made


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    items = [item[1] if isinstance(item, tuple) else item for item in params]
    if items and isinstance(items[0], dict):
        return [{**group, "params": _listed(group["params"])} for group in items]
    return [{"params": items}]


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _completed(group: dict[str, Any]) -> dict[str, Any]:
    """A group with the defaults of its rule."""
    if "use_muon" not in group:
        raise ValueError(
            explain(
                "a param group does not say whose it is", got=sorted(group), fix="add 'use_muon'"
            )
        )
    defaults = _MUON_DEFAULTS if group["use_muon"] else _ADAM_DEFAULTS
    unknown = set(group) - {"params", "use_muon", "name", "initial_lr"} - set(defaults)
    if unknown:
        raise ValueError(
            explain(
                f"a param group with use_muon={group['use_muon']} has keys that its rule does not take",
                got=", ".join(sorted(unknown)),
                expected=", ".join(defaults),
            )
        )
    made = {**defaults, **group, "params": _listed(group["params"])}
    if not group["use_muon"]:
        return made
    if made["ns_method"] not in NS_METHODS:
        raise ValueError(
            explain("unknown ns_method", got=made["ns_method"], expected=" or ".join(NS_METHODS))
        )
    flat = [tuple(shape_of(p)) for p in made["params"] if len(shape_of(p)) < 2]
    if flat:
        raise ValueError(
            explain(
                "Muon steps matrices",
                got=f"a parameter of shape {flat[0]} in a group with use_muon=True",
                expected="two dimensions or more",
                fix="put it into a group with use_muon=False",
            )
        )
    return made
