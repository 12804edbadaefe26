# SPDX-License-Identifier: Apache-2.0
"""What the engine's one loop drives: a sharded optimizer, a plain torch optimizer, or none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis, Mesh
from deepspeed.ops.norms import squared_norm
from deepspeed.utils.errors import explain

from .sparse_gradients import average_rows, grad_values
from .zero.buckets import repeats
from .zero.grad_norm import counted_elsewhere, largest_norm, spread_experts, whole_square
from .zero.optimizer import ZeroOptimizer
from .zero.plan import Plan
from .zero.reducer import average_grads
from .zero.residency import Residency


class SlabDriver:
    """Drives a `ZeroOptimizer`, which does norm, clipping, overflow and publication by itself.

    Args:
        optimizer: the sharded optimizer.
        residency: keeps sharded parameters whole while they are in use; None below stage 3.
    """

    def __init__(self, optimizer: ZeroOptimizer, residency: Residency | None = None) -> None:
        self.optimizer = optimizer
        self.residency = residency
        self.reduces_each_backward = optimizer.plan.reduces_each_backward
        if residency is not None:
            optimizer.reducer.after_grad = residency.after_grad

    def begin(self, sync: bool) -> None:
        self.optimizer.order.begin_backward()
        self.optimizer.reducer.keep_apart(_reduces_itself(self.optimizer.optimizer))
        self.optimizer.reducer.begin(sync)
        if self.residency is not None:
            self.residency.begin_backward()

    def finish(self, sync: bool) -> None:
        self.optimizer.reducer.finish()
        if self.residency is not None:
            self.residency.finish_backward()

    def reduce_now(self) -> None:
        self.optimizer.reducer.reduce_now()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return self.optimizer.scale_loss(loss)

    @property
    def needs_scale(self) -> bool:
        return self.optimizer.needs_scaler()

    def step(self) -> bool:
        """Step; returns whether weights changed."""
        self.optimizer.step()
        if self.residency is not None:
            self.residency.after_step()
        return not self.optimizer.overflow

    def change_scaling(self, plan: Plan) -> None:
        """Refuse to."""
        raise NotImplementedError(
            explain(
                "engine.gradient_average cannot be changed where gradients are kept in slabs",
                got=f"stage {self.optimizer.plan.stage} in {self.optimizer.precision.compute or 'fp32'}",
                expected="stage 0 in fp32",
                fix="set 'gradient_allreduce_op' in the configuration",
            )
        )

    @property
    def grad_norm(self) -> Any:
        return self.optimizer._global_grad_norm

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def destroy(self) -> None:
        self.optimizer.destroy()
        if self.residency is not None:
            self.residency.remove_hooks()


def _is_frozen(param: torch.nn.Parameter) -> bool:
    """Whether a parameter was frozen in mid-run: zeros for a gradient would let it decay."""
    return not param.requires_grad and param.grad is None


def _reduces_itself(optimizer: Any) -> bool:
    """Whether an optimizer averages over the ranks by itself what it takes from the next gradients."""
    return bool(getattr(optimizer, "reduces_itself", False))


class PlainDriver:
    """Drives a torch optimizer on the module's own parameters (stage 0, full precision or autocast).

    Args:
        optimizer: the user's optimizer.
        params: trainable parameters, with the axis over which the gradients of each list are averaged.
        plan: bucket size and gradient scaling.
        clip_grad: largest 2-norm of all gradients; 0 for none.
        reduce_dtype: dtype of gradients on the wire; None is their own.
        scaler: for fp16 autocast.
        mesh: the ranks, whose parts of the model share one norm and one verdict on overflow; None for one rank.
        rows: weights whose gradients travel as rows, and whether they are sparse tensors; see `runtime.sparse_gradients`.
    """

    reduces_each_backward = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: Sequence[tuple[Axis, list[torch.nn.Parameter]]],
        plan: Plan,
        clip_grad: float,
        reduce_dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        mesh: Mesh | None = None,
        rows: Mapping[torch.nn.Parameter, bool] | None = None,
    ) -> None:
        self.rows = dict(rows or {})
        self.optimizer, self.params, self.plan, self.clip_grad = (
            optimizer,
            list(params),
            plan,
            clip_grad,
        )
        self.reduce_dtype, self.scaler = reduce_dtype, scaler
        self.mesh = Mesh.single() if mesh is None else mesh
        self._axes = self._model_axes()
        self.grad_norm: Any = None
        self._unreduced = self._summed = False

    def begin(self, sync: bool) -> None:
        self._before_adding()
        self._unreduced = not sync

    def finish(self, sync: bool) -> None:
        if sync:
            self.reduce_now()

    def reduce_now(self) -> None:
        if _reduces_itself(self.optimizer):
            self._unreduced = False
            return
        self._before_adding()
        for axis, params in self.params:
            whole = [param for param in params if param not in self.rows and not _is_frozen(param)]
            average_grads(whole, axis, self.plan, self.reduce_dtype)
            for param in params:
                if param in self.rows:
                    average_rows(param, self.rows[param], axis, self.plan, self.reduce_dtype)
        self._unreduced, self._summed = False, True

    def _before_adding(self) -> None:
        """What was summed over the ranks becomes this rank's part of the next sum."""
        for axis, params in self.params if self._summed else ():
            times = repeats(self.plan, axis.size)
            if axis.size > 1 and times != 1:
                for param in params:
                    if param.grad is not None:
                        param.grad.div_(times)
        self._summed = False

    def change_scaling(self, plan: Plan) -> None:
        """Add gradients up, or average them, as `plan` says from now on; those not stepped yet are, too."""
        self._unreduced = self._unreduced or self._summed
        self._before_adding()
        self.plan = plan

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    @property
    def needs_scale(self) -> bool:
        return self.scaler is not None

    def step(self) -> bool:
        """Clip and step; returns whether weights changed."""
        if self._unreduced:
            self.reduce_now()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            apart = [self.mesh.sequence_data] if _reduces_itself(self.optimizer) else []
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                for axis in (*self._axes, *apart):
                    flat.all_reduce_(found, axis, "max")
        self._clip()
        applied = True
        if self.scaler is None:
            self.optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            applied = self.scaler.get_scale() >= before
        self.zero_grad()
        return applied

    def _clip(self) -> None:
        if self.clip_grad <= 0:
            return
        with_grad = [p for _, params in self.params for p in params if p.grad is not None]
        apart = _reduces_itself(self.optimizer)
        if self._axes or apart or self.rows:
            norm = self._clip_over_ranks(with_grad, apart)
        else:
            norm = torch.nn.utils.clip_grad_norm_(with_grad, self.clip_grad)
        if math.isfinite(norm):
            self.grad_norm = norm.detach()
        elif self.scaler is None:
            self.zero_grad()
            raise FloatingPointError(
                explain(
                    "gradients are not finite, so the step was not taken and weights are as before",
                    got=f"a gradient norm of {norm.item()}",
                    expected="finite gradients",
                    fix="look for NaN in the batch or a division by zero in the loss, or lower the learning rate",
                )
            )

    def _model_axes(self) -> list[Axis]:
        """The axes whose ranks hold different parts of the model."""
        names = [spread_experts(p, self.mesh) for _, params in self.params for p in params]
        found = [self.mesh.expert[name] for name in dict.fromkeys(names) if name is not None]
        return [*found, self.mesh.model] if self.mesh.model.size > 1 else found

    def _clip_over_ranks(self, params: list[torch.nn.Parameter], apart: bool) -> torch.Tensor:
        # Averaged gradients are alike on the ranks that they were averaged over, so nothing is summed over those.
        alone = Axis.alone(self.mesh.world.ranks[self.mesh.world.rank])
        squares: dict[tuple[Axis, str | None], torch.Tensor] = {}
        for param in (p for _, params in self.params for p in params):
            key = (alone, spread_experts(param, self.mesh))
            squares.setdefault(key, torch.zeros((), dtype=torch.float64, device=param.device))
            if param.grad is not None and not counted_elsewhere(param, self.mesh):
                squares[key] += squared_norm(grad_values(param)).to(param.device)
        device = params[0].device if params else torch.device("cpu")
        square = whole_square(squares, self.mesh)
        norm = torch.tensor(square, dtype=torch.float64, device=device).sqrt().float()
        if apart:
            worst = largest_norm(norm.item(), self.mesh.sequence_data, device)
            norm = torch.tensor(worst, dtype=torch.float32, device=device)
        factor = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        for param in params:
            grad_values(param).mul_(factor.to(param.device))
        return norm

    def zero_grad(self) -> None:
        self._summed = False
        for _, params in self.params:
            for param in params:
                param.grad = None

    def destroy(self) -> None:
        """Nothing is held."""


class NoDriver:
    """Stands for the optimizer of an engine that has none.

    Args:
        residency: keeps sharded parameters whole while they are in use; None below stage 3.
    """

    def __init__(self, residency: Residency | None = None) -> None:
        self.residency = residency

    reduces_each_backward = False
    needs_scale = False
    grad_norm: Any = None

    def begin(self, sync: bool) -> None:
        """Nothing to prepare."""

    def finish(self, sync: bool) -> None:
        """Nothing to reduce for."""

    def reduce_now(self) -> None:
        """Nothing to reduce for."""

    def change_scaling(self, plan: Plan) -> None:
        """Nothing to scale."""

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def step(self) -> bool:
        raise RuntimeError(
            explain(
                "this engine has no optimizer to step",
                got="neither optimizer= nor an 'optimizer' section",
                expected="one of the two",
                fix="pass optimizer=, or add an 'optimizer' section to the configuration",
            )
        )

    def zero_grad(self) -> None:
        """Nothing is held."""

    def destroy(self) -> None:
        """Remove the hooks of sharded parameters."""
        if self.residency is not None:
            self.residency.remove_hooks()


Driver = SlabDriver | PlainDriver | NoDriver
