# SPDX-License-Identifier: Apache-2.0
"""Drives shard groups through a step: norm, overflow, clip, step, publish.

The user's torch optimizer stays in charge of the arithmetic: its param groups (the same dict objects, so schedulers go
on driving them) come to hold flat master shards instead of module parameters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis, Mesh
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase, report_overflow
from deepspeed.runtime.precision import Precision
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from . import load_state, offload_states, state
from .diagnose import some_of, unused_message
from .grad_norm import expert_group_name, largest_norm, square_of_groups
from .plan import Placement, Plan, TierKind
from .reducer import Reducer
from .shard_group import ShardGroup, ShardPart
from .spill import SpillFolder, together
from .step_order import StepOrder

_CLIP_EPSILON = 1e-6


class ZeroOptimizer(DeepSpeedOptimizer):
    """A torch optimizer whose parameters, gradients and states are flat slabs placed by a `Plan`.

    Args:
        optimizer: the optimizer to drive; its parameters must be on `device` and require gradients or be frozen.
        plan: the ZeRO row.
        precision: dtypes and loss scaling.
        mesh: the ranks.
        device: where the model computes.
        clip_grad: largest 2-norm of all gradients together; 0 for no clipping.
        param_names: name of each parameter, for messages.
        folder: where states live in files, if the plan says so.

    Raises:
        ValueError: if no parameter requires a gradient.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        precision: Precision,
        mesh: Mesh,
        device: torch.device,
        clip_grad: float = 0.0,
        param_names: Mapping[torch.nn.Parameter, str] | None = None,
        folder: SpillFolder | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.folder = folder
        self.plan, self.precision, self.mesh, self.device = plan, precision, mesh, device
        self.clip_grad = clip_grad
        self.param_names = dict(param_names or {})
        self.overflow = False
        self.loss_scaler: LossScalerBase = precision.make_scaler()
        self.external_loss_scale: float | None = None
        self._global_grad_norm: torch.Tensor | None = None
        self._drop_old_states()
        with self._files_together("make the files of its offloaded states"):
            self.groups = self._build_groups()
        self.reducer = Reducer(self.groups, plan)
        self.order = StepOrder(self)
        self._take_over_param_groups()
        self._refill_states()

    # - construction

    def _drop_old_states(self) -> None:
        taken = [states.get("step", 1) for states in self.optimizer.state.values()]
        if any(step > 0 for step in taken):
            logger.warning(
                "the optimizer has taken steps before deepspeed.initialize; its states are dropped"
            )
        self.optimizer.state.clear()

    def _refill_states(self) -> None:
        """Make the states that `torch.optim.Adagrad` makes in its constructor and expects ever after."""
        if not isinstance(self.optimizer, torch.optim.Adagrad):
            return
        with self._files_together("write its offloaded states"), self.in_memory():
            for group, part in self._parts():
                options = self.optimizer.param_groups[group.param_group_index]
                full = torch.full_like(part.master, options["initial_accumulator_value"])
                self.optimizer.state[part.master] = {
                    "step": torch.tensor(0.0, device="cpu"),
                    "sum": full.detach(),
                }

    def _build_groups(self) -> list[ShardGroup]:
        groups = []
        for index, param_group in enumerate(self.optimizer.param_groups):
            kinds: dict[tuple[Any, ...], list[torch.nn.Parameter]] = {}
            for param in param_group["params"]:
                if param.requires_grad:
                    alone = id(param) if self._needs_params_apart() else None
                    key = (param.dtype, expert_group_name(param), alone)
                    kinds.setdefault(key, []).append(param)
            for (_, expert, _), params in kinds.items():
                shard_axis, replica_axis = self._axes(expert)
                groups.append(
                    ShardGroup(
                        params,
                        index,
                        shard_axis,
                        replica_axis,
                        self.plan,
                        self.precision,
                        self.device,
                        self.folder,
                    )
                )
        if not groups:
            raise ValueError(
                explain(
                    "there is nothing to train",
                    got="an optimizer with no parameter that requires a gradient",
                    expected="at least one",
                    fix="unfreeze parameters, or call deepspeed.initialize without an optimizer",
                )
            )
        return groups

    def _needs_params_apart(self) -> bool:
        """Whether the rule takes norms of parameters, which only whole states can give it."""
        return self.plan.stage == 0 and getattr(self.optimizer, "per_param", False)

    def _axes(self, expert: str | None) -> tuple[Axis, Axis]:
        """The ranks that share a group's states, and those that hold copies of them."""
        alone = Axis.alone(self.mesh.world.ranks[self.mesh.world.rank])
        shared = self.mesh.state_axes if expert is None else (self.mesh.expert_data[expert], alone)
        if self.plan.states is Placement.SHARDED:
            return shared
        return alone, self.mesh.sequence_data if expert is None else shared[0]

    def _take_over_param_groups(self) -> None:
        for index, param_group in enumerate(self.optimizer.param_groups):
            mine = [group for group in self.groups if group.param_group_index == index]
            param_group["params"] = [part.master for group in mine for part in group.parts]
        for number, group in enumerate(self.groups):
            for index, param in enumerate(group.params):
                param._zero_optimizer = self
                param._index_in_param_group = number
                param.param_idx_in_group = index
                if group.params_sharded:
                    param._z3_optimizer = self
                    param._refresh_master = partial(group.take_param, index)

    # - the surface of a torch optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups: changing a group's `lr` takes effect."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's state, keyed by flat master shards."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients of the accumulation under way."""
        for group in self.groups:
            for param in group.params:
                if set_to_none or param.grad is None:
                    param.grad = None
                else:
                    param.grad.zero_()
        self.order.forget()
        self.reducer.end_step(release=False)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self.param_groups:
            group["lr"] = lr

    def get_lr(self) -> float:
        """The learning rate of the first group."""
        return self.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, in the layout of a checkpoint's optimizer file."""
        with self.in_memory(), self.order.packed():
            return state.state_dict(self)

    def load_state_dict(
        self, state_dict_list: Any, load_optimizer_states: bool = True, **options: Any
    ) -> None:
        """Take over what `state_dict` gave (or the list of all ranks' such dicts)."""
        with self.in_memory(), self.order.packed(loading=True):
            load_state.load_state_dict(
                self, state_dict_list, load_optimizer_states=load_optimizer_states, **options
            )

    def refresh_fp32_params(self) -> None:
        """Take the model's current weights as master weights."""
        with self.in_memory():
            for group in self.groups:
                group.masters_from_params()

    def update_lp_params(self) -> None:
        """Write the master weights into the model."""
        with self.in_memory():
            for group in self.groups:
                group.params_from_masters()

    @contextlib.contextmanager
    def in_memory(self) -> Iterator[None]:
        """Extent in which all states are in memory, for whoever reads or writes them as a whole."""
        spilled = [
            part.spilled
            for _, part in self._parts()
            if part.spilled is not None and not part.spilled.resident
        ]
        states = self.optimizer.state
        for file in spilled:
            file.fetch()
        for file in spilled:
            file.arrive(states[file.master])
        try:
            with self.order.at_home():
                yield
        finally:
            for file in spilled:
                file.flush(states[file.master])
            for file in spilled:
                file.settle(states[file.master])

    # - loss scaling

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass."""
        return (
            self.loss_scaler.loss_scale
            if self.external_loss_scale is None
            else self.external_loss_scale
        )

    cur_scale = loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        return self.loss_scaler.dynamic

    def override_loss_scale(self, loss_scale: float) -> None:
        """Use a scale chosen by the caller from now on."""
        self.external_loss_scale = loss_scale
        self.reducer.forget_losses()

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` times the loss scale (the same tensor when the scale is 1)."""
        return loss if self.loss_scale == 1.0 else loss.float() * self.loss_scale

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, **_: Any) -> None:
        """Back-propagate the scaled loss."""
        self.scale_loss(loss).backward(retain_graph=retain_graph)

    # - the step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step all groups with the gradients that were reduced, unless they overflowed.

        Raises:
            RuntimeError: for a closure, which sharded gradients cannot serve.
            AssertionError: for a parameter without a gradient, where the plan wants all to have one.
            FloatingPointError: for non-finite gradients where no loss scaling explains them; weights stay as they were.
        """
        if closure is not None:
            raise RuntimeError(
                explain(
                    "optimizer closures are not supported",
                    fix="compute the loss before step() and call it with no argument",
                )
            )
        self.reducer.reduce_left_over()
        if self.plan.every_gradient:
            self._refuse_unused()
        for group in self.groups:
            group.clear_unwritten()
        with self._files_together("write its gradients"):
            self._finish_grad_files()
        norm = self._norm()
        scale = self.loss_scale
        self.overflow = not (math.isfinite(norm) or self.precision.take_overflow)
        if self.overflow:
            self._skip(scale)
            return
        self._global_grad_norm = torch.tensor(norm / scale, dtype=torch.float32, device=self.device)
        self._step_groups(1.0 / self._combined_scale(norm, scale))
        self.loss_scaler.update_scale(False)
        self._end_step()
        if self.loss_scale != scale:
            self.reducer.forget_losses()

    def _refuse_unused(self) -> None:
        every = [param for group in self.groups for param in group.params]
        unused = [param for param in every if id(param) not in self.reducer.seen]
        if not flat.all_ok(not unused, self.mesh.world):
            self._end_step()
            raise AssertionError(unused_message([self.param_names.get(p, "?") for p in unused]))

    def _norm(self) -> float:
        """2-norm of all gradients, still multiplied by the loss scale; equal on all ranks."""
        total = square_of_groups(self.groups, self.mesh, self.device)
        norm = math.sqrt(total) if total >= 0 else total
        if self.reducer.keeps_apart:
            return largest_norm(norm, self.mesh.sequence_data, self.device)
        return norm

    def _combined_scale(self, norm: float, scale: float) -> float:
        """What gradients are divided by: the loss scale, and what brings their norm down to `clip_grad`."""
        if self.clip_grad <= 0:
            return scale
        excess = (norm / scale + _CLIP_EPSILON) / self.clip_grad
        return scale * max(1.0, excess)

    def _skip(self, scale: float) -> None:
        """Leave weights as they are; adapt the loss scale, or say which gradients are broken."""
        self.order.forget()
        self.reducer.forget_losses()
        if not self.precision.check_overflow:
            broken = self._non_finite_names()
            self._end_step()
            raise FloatingPointError(
                explain(
                    "gradients are not finite, so the step was not taken and weights are as before",
                    got="inf or NaN in the gradient of "
                    + (broken or "a parameter held by another rank"),
                    expected="finite gradients",
                    fix="look for NaN in the batch or a division by zero in the loss, or lower the learning rate",
                )
            )
        hysteresis = getattr(self.loss_scaler, "cur_hysteresis", None)
        try:
            self.loss_scaler.update_scale(True)
        finally:
            self._end_step()
        report_overflow(scale, self.loss_scaler, hysteresis)

    def _non_finite_names(self) -> str:
        names = []
        for group in self.groups:
            for segment in group.layout.segments(group.shard_axis.rank):
                for part, _, start, length in group.runs(segment.shard_start, segment.length):
                    if not group.grad_of(part).narrow(0, start, length).isfinite().all():
                        names.append(
                            self.param_names.get(
                                group.params[segment.param], "an unnamed parameter"
                            )
                        )
        return some_of(list(dict.fromkeys(names)))

    def _step_groups(self, grad_scale: float) -> None:
        with self._files_together("read or write its offloaded states, so this step is incomplete"):
            self.order.step(grad_scale)
        for pending in [group.publish() for group in self.groups]:
            pending.wait()

    def _files_together(self, what: str) -> contextlib.AbstractContextManager:
        """Extent in which an error of one rank's files is raised on all ranks."""
        if self.folder is None and self.plan.param_tier is not TierKind.FILE:
            return contextlib.nullcontext()
        return together(self.mesh.world, what)

    def _finish_grad_files(self) -> None:
        for _, part in self._parts():
            if part.spilled_grad is not None:
                part.spilled_grad.finish_writes()

    def _parts(self) -> Iterable[tuple[ShardGroup, ShardPart]]:
        return ((group, part) for group in self.groups for part in group.parts)

    def _end_step(self) -> None:
        sharded = any(group.shard_axis.size > 1 for group in self.groups)
        self.reducer.end_step(release=sharded and not self.plan.reduces_each_backward)

    # - lifetime

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Move states out of the device's memory; arguments as of `engine.offload_states`."""
        offload_states.offload_states(self, *args, **kwargs)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` moved."""
        offload_states.reload_states(self, non_blocking)

    def destroy(self) -> None:
        """Remove the hooks on the parameters, and the files of offloaded states; unlock what was page-locked for them."""
        self.order.close()
        self.reducer.remove_hooks()
        for _, part in self._parts():
            get_accelerator().unpin_memory(part.master)
            if part.held_grad is not None:
                get_accelerator().unpin_memory(part.held_grad)
        if self.folder is not None:
            self.folder.close()
