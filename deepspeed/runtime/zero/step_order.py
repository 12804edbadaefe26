# SPDX-License-Identifier: Apache-2.0
"""In which order the parts of a training state are stepped, once gradients are reduced and the norm is known.

The plain order steps all parts, one after the other. ZenFlow and SuperOffload are other orders: they say which part is
stepped when, and keep everybody who reads states or edits gradients from noticing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.ops.elementwise import ElementwiseOptimizer

from .host_copies import pieces_for
from .pieces import in_pieces
from .shard_group import ShardGroup, ShardPart
from .spill import stream
from .whole_params import needs_whole, step_whole

if TYPE_CHECKING:
    from .optimizer import ZeroOptimizer

KEPT = "zenflow_"
"""How names of states begin that only the order of a step reads."""


class StepOrder:
    """The plain order, and what another one may do differently.

    Args:
        owner: whose parts are stepped.
    """

    keeps_more = False
    """Whether this order reads states of checkpoints that begin with `KEPT`; others leave them out."""

    def __init__(self, owner: ZeroOptimizer) -> None:
        self.owner = owner

    def begin_backward(self) -> None:
        """Called before a backward pass."""

    def step(self, grad_scale: float) -> None:
        """Step everything by the reduced gradients times `grad_scale`, and bring it into the parameters."""
        self.step_parts(self.owner._parts(), grad_scale)

    def drop(self) -> None:
        """Called before gradients that wait for their step are edited."""

    def forget(self) -> None:
        """Called where gradients are forgotten without a step."""

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Extent in which masters and states hold what they stand for; edits count."""
        yield

    @contextlib.contextmanager
    def packed(self, loading: bool = False) -> Iterator[None]:
        """Extent, inside of `at_home`, in which states hold all that a checkpoint needs."""
        yield

    def settle(self) -> None:
        """Finish what runs beside the training, before a checkpoint is written; a collective."""

    def close(self) -> None:
        """Let go of threads."""

    # - the parts themselves

    def step_parts(self, parts: Iterable[tuple[ShardGroup, ShardPart]], grad_scale: float) -> None:
        """Step some parts by the inner optimizer and lower their masters."""
        parts, inner = list(parts), self.owner.optimizer
        step_shard = self.fused_rule()
        if step_shard is None and self.owner.folder is None:
            self._step_inner(parts, grad_scale)
            return
        owner: dict[int, ShardGroup] = {}
        for group in dict.fromkeys(group for group, _ in parts):
            options = inner.param_groups[group.param_group_index]
            if needs_whole(inner, options):
                step_whole(inner, options, group, grad_scale)
            else:
                owner.update((id(part), group) for part in group.parts)
        for part in stream((part for _, part in parts if id(part) in owner), inner.state):
            group = owner[id(part)]
            options = inner.param_groups[group.param_group_index]
            grad = group.grad_of(part)
            if step_shard is None:
                self._step_one(options, part, grad, grad_scale)
                group.lower(part)
                continue
            if part.low is not None and part.low.device == part.master.device:
                step_shard(options, part.master, grad, part.low, grad_scale)
            elif part.lowers_to_gpu and isinstance(inner, ElementwiseOptimizer):
                inner.step_pieces(options, part.master, grad, pieces_for(part.low), grad_scale)
            else:
                step_shard(options, part.master, grad, None, grad_scale)
                group.lower(part)
        # What torch's schedulers read to know that step() came before theirs.
        inner._opt_called = True  # type: ignore[attr-defined]

    def _step_one(
        self, options: dict[str, Any], part: ShardPart, grad: torch.Tensor, grad_scale: float
    ) -> None:
        """Step any torch optimizer on one flat parameter."""
        inner = self.owner.optimizer
        part.master.grad = grad.to(part.master.dtype) * grad_scale
        groups = inner.param_groups
        inner.param_groups = [{**options, "params": [part.master]}]
        try:
            with in_pieces(inner):
                inner.step()
        finally:
            inner.param_groups = groups
            part.master.grad = None

    def options_now(self, group: ShardGroup) -> dict[str, Any]:
        """The settings of a group, which schedules and callers do not change any more: a tensor `lr` is changed in place."""
        options = self.owner.param_groups[group.param_group_index]
        return {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in options.items()
            if key != "params"
        }

    def fused_rule(self) -> Any:
        """The inner optimizer's own step of one flat shard, if nothing has been put in front of its `step`."""
        inner = self.owner.optimizer
        hooked = getattr(inner, "_optimizer_step_pre_hooks", None) or getattr(
            inner, "_optimizer_step_post_hooks", None
        )
        if hooked or not type(inner).__module__.startswith("deepspeed."):
            return None
        return getattr(inner, "step_shard", None)

    def _step_inner(self, parts: Iterable[tuple[ShardGroup, ShardPart]], grad_scale: float) -> None:
        """Step any torch optimizer: gradients in the masters' dtype, unscaled."""
        for group, part in parts:
            grad = group.grad_of(part)
            part.master.grad = (
                grad if grad.dtype == part.master.dtype else grad.to(part.master.dtype)
            )
            if grad_scale != 1.0:
                part.master.grad.mul_(grad_scale)
        with in_pieces(self.owner.optimizer):
            self.owner.optimizer.step()
        for group, part in parts:
            part.master.grad = None
            group.lower(part)
