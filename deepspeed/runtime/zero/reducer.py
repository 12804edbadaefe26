# SPDX-License-Identifier: Apache-2.0
"""Gradients on their way from autograd to the shard that steps them.

[Note: Order of gradient collectives]
Ranks may see parameters' gradients arrive in different orders, or not at all (data-dependent branches). Collectives
must nevertheless start in one order everywhere, or ranks reduce different things into each other. Buckets are therefore
cut once, from the end of the flat range (where the backward pass begins), and bucket k starts only after bucket k-1;
what has not arrived by the end of the backward pass counts as zero.

[Note: Gradients that arrive twice]
Reentrant activation checkpointing runs a backward pass inside the backward pass, so a parameter used in two
checkpointed regions gets its gradient in two instalments, the second perhaps after its bucket has left. The first time
that is seen, the rest goes in a second round, and from then on buckets wait for the end of the backward pass. As it may
be seen on some ranks only, the ranks vote, after backward passes that had others inside. So where a rank has such
a region in a pass, all ranks must have one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.torch_autocast import get_comm_dtype

from .blocks import Blocks
from .buckets import Bucket, cut_buckets, scale_factors
from .host_copies import Incoming
from .plan import Plan
from .shard_group import ShardGroup


class Reducer:
    """Collects gradients through hooks, averages them over the ranks and leaves them in the groups' shards.

    Args:
        groups: all groups of the optimizer.
        plan: the ZeRO row.

    Attributes:
        before_first_grad: called when a gradient arrives outside `begin` … `finish` (a plain `loss.backward()`).
        seen: identities of the parameters that had a gradient since the last step, where the plan wants all to have one.
        after_grad: called with a parameter whose gradient has been taken, so that nothing needs its values any more.
        before_pass: called before gradients add up, or are reduced.
        after_pass: called when that is over.
    """

    def __init__(self, groups: Sequence[ShardGroup], plan: Plan) -> None:
        self.groups, self.plan = list(groups), plan
        self.before_first_grad: Callable[[], None] | None = None
        self.after_grad: Callable[[torch.nn.Parameter], None] | None = None
        self.before_pass: Callable[[], None] = _nothing
        self.after_pass: Callable[[], None] = _nothing
        self.active = False
        self.seen: set[int] = set()
        self._sync = False
        self._wait_for_end = False
        self._late = self._nested = False
        self._task = -1
        self._unreduced = False
        self._next = 0
        self._flying: list[tuple[Bucket, flat.Handle]] = []
        self._held: dict[int, torch.Tensor] = {}
        self._buckets = [
            bucket
            for group in reversed(self.groups)
            if group.shard_axis.size > 1 or group.replica_axis.size > 1
            for bucket in cut_buckets(group, plan)
        ]
        self._apart: list[Bucket] = []
        self.blocks = Blocks()
        for bucket in self._buckets:
            bucket.blocks = self.blocks
        self._bucket_of = self._index_buckets()
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._on_grad, group, index))
            for group in self.groups
            for index, param in enumerate(group.params)
        ]

    def _index_buckets(self) -> dict[tuple[int, int], Bucket]:
        return {(id(b.group), index): b for b in self._buckets for index in b.indices}

    # - one backward pass

    @property
    def keeps_apart(self) -> bool:
        """Whether gradients stay as each rank has them."""
        return bool(self._apart)

    def keep_apart(self, apart: bool) -> None:
        """Leave gradients as each rank has them, or average them again (stage 0, where each has room for all)."""
        if apart is bool(self._apart) or not (self._apart or self._buckets):
            return
        self._buckets, self._apart = self._apart, self._buckets
        self._bucket_of = self._index_buckets()

    def begin(self, sync: bool) -> None:
        """Start a backward pass. `sync` says that it reduces over the ranks; otherwise gradients only add up here."""
        self.before_pass()
        self._drop_round()
        self.active = True
        self._nested, self._task = False, -1
        self._sync = sync and bool(self._buckets)
        if self._sync:
            self._start_round()

    def note_outermost(self) -> None:
        """Called where a backward pass enters the model, before parameters have gradients: other passes are inside it."""
        if self._task == -1:
            self._task = torch._C._current_graph_task_id()

    def finish(self) -> None:
        """End the backward pass: send what has not left yet, wait for all of it."""
        if not self.active:
            return
        self.active = False
        if self._sync:
            self._finish_round()
            if (self._late or self._nested) and not self._wait_for_end and self._late_anywhere():
                self._wait_for_end = True
                self._reduce_all()
            self._late = self._unreduced = False
        else:
            self._unreduced = bool(self._buckets)
        self._settle()
        self.after_pass()

    def _late_anywhere(self) -> bool:
        """Whether a gradient came after its bucket had left, on any rank; a collective of all of them."""
        groups = [bucket.group for bucket in self._buckets]
        axes = dict.fromkeys(axis for g in groups for axis in (g.shard_axis, g.replica_axis))
        on_time = not self._late
        for axis in axes:
            on_time = flat.all_ok(on_time, axis)
        return not on_time

    def reduce_now(self) -> None:
        """Reduce all that earlier backward passes left unreduced; a collective of all ranks."""
        if self._buckets:
            self.before_pass()
            self._reduce_all()
            self._settle()
            self.after_pass()

    def _reduce_all(self) -> None:
        self._start_round()
        self._finish_round()
        self._sync = self._unreduced = False

    def reduce_left_over(self) -> None:
        """Reduce, if the last backward pass did not (all ranks agree on that: it follows from the step count)."""
        if self._unreduced:
            self.reduce_now()

    def end_step(self, release: bool) -> None:
        """Forget the gradients that a step has used."""
        self.before_pass()
        self._drop_round()
        for group in self.groups:
            group.forget_grads(release)
        for bucket in (*self._buckets, *self._apart):
            bucket.begin_step()
        self.blocks.clear()
        self.seen.clear()
        flat.free_inboxes()
        self._held.clear()
        self._unreduced = False

    def forget_losses(self) -> None:
        """Make up for nothing that codes of gradients lost so far."""
        for bucket in self._buckets:
            bucket.forget_losses()

    def take(self, param: torch.nn.Parameter) -> None:
        """Take over `param.grad`, which was completed outside of a backward pass; reduced by `reduce_now`."""
        group, index = self.groups[param._index_in_param_group], param.param_idx_in_group
        if param.grad is not None:
            if (id(group), index) in self._bucket_of:
                self._hold(group, index, param)
            else:
                self._keep_whole(group, index, param)
                group.incoming.settle()

    def take_from_graph(self, param: torch.nn.Parameter, grad: torch.Tensor) -> None:
        """A compiled backward graph has a parameter's gradient, and autograd is not going to see it."""
        param.grad = grad if param.grad is None else param.grad + grad
        self._on_grad(self.groups[param._index_in_param_group], param.param_idx_in_group, param)
        # the graph uses its buffers again
        Incoming.fence(grad.device)
        if param.grad is grad:
            param.grad = grad.clone()

    def remove_hooks(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _settle(self) -> None:
        """All gradients are in the groups' shards."""
        for group in self.groups:
            group.incoming.settle()

    # - inside a pass

    def _on_grad(self, group: ShardGroup, index: int, param: torch.nn.Parameter) -> None:
        if param.grad is None:
            return  # handed over by a compiled graph; autograd tells of it nevertheless
        if not getattr(param, "ds_grad_is_ready", True):
            return  # the module adds its gradient up in instalments and raises the flag with the last one
        if param.grad.is_sparse:
            param.grad = param.grad.to_dense()  # slabs are dense
        if not self.active and self.before_first_grad is not None:
            self.before_first_grad()
        if self.plan.every_gradient:
            self.seen.add(id(param))
        bucket = self._bucket_of.get((id(group), index))
        task = torch._C._current_graph_task_id()
        self._nested = self._nested or self._task not in (-1, task)
        self._task = task
        if bucket is None:
            self._keep_whole(group, index, param)
        elif not self._sync:
            self._hold(group, index, param)
        elif bucket.launched:
            self._late = True
        else:
            self._collect(bucket, index, param)
            if not self._wait_for_end:
                self._launch_ready()
        if self.after_grad is not None:
            self.after_grad(param)

    @staticmethod
    def _keep_whole(group: ShardGroup, index: int, param: torch.nn.Parameter) -> None:
        group.add_param_grad(index, param.grad)
        param.grad = None

    def _hold(self, group: ShardGroup, index: int, param: torch.nn.Parameter) -> None:
        """Keep an unreduced gradient: in `.grad` itself, unless it adds up in another dtype or has a slab of its own."""
        if group.shard_axis.size == 1:
            self._bucket_of[id(group), index].before_adding()
            self._keep_whole(group, index, param)
            return
        if group.accumulate_dtype == param.dtype:
            return
        held = self._held.get(id(param))
        if held is None:
            self._held[id(param)] = param.grad.to(group.accumulate_dtype)
        else:
            held.add_(param.grad)
        param.grad = None

    def _collect(self, bucket: Bucket, index: int, param: torch.nn.Parameter) -> bool:
        """Put a gradient, and what was held of it, into its bucket; False if there is none."""
        found = [self._held.pop(id(param), None), param.grad]
        gradients = [values for values in found if values is not None]
        if gradients:
            bucket.collect(index, gradients)
        param.grad = None
        return bool(gradients)

    # - rounds of collectives

    def _start_round(self) -> None:
        self._next = 0
        for bucket in self._buckets:
            bucket.restart()

    def _finish_round(self) -> None:
        while self._next < len(self._buckets):
            self._launch()
        while self._flying:
            self._land()

    def _drop_round(self) -> None:
        """If the last backward pass raised, let what it has sent arrive, and forget it."""
        if not self.active:
            return
        self.active = False
        for _, pending in self._flying:
            pending.wait()
        self._flying.clear()
        for bucket in self._buckets:
            bucket.drop()
        self._late = False
        self._settle()

    def _launch_ready(self) -> None:
        while self._next < len(self._buckets) and self._buckets[self._next].missing <= 0:
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        for index in bucket.indices:
            # An earlier micro-batch may have left a gradient that this one had no part in.
            if index not in bucket.arrived and not self._collect(
                bucket, index, bucket.group.params[index]
            ):
                bucket.lack(index)
        bucket.launched = True
        self._flying.append((bucket, bucket.launch()))
        while len(self._flying) > self.plan.buckets_in_flight:
            self._land()

    def _land(self) -> None:
        bucket, pending = self._flying.pop(0)
        pending.wait()
        bucket.land()


def _nothing() -> None:
    pass


def average_grads(
    params: Sequence[torch.nn.Parameter], axis: Axis, plan: Plan, dtype: torch.dtype | None
) -> None:
    """Average `.grad` of `params` over `axis`, in buckets (stage 0 without slabs; every rank must call it).

    Args:
        params: parameters in an order common to all ranks; one without a gradient counts as zero.
        axis: ranks to average over.
        plan: bucket size and scaling.
        dtype: dtype on the wire; None is autocast's for parameters that are marked so, else the gradients' own.
    """
    if axis.size == 1:
        return
    before, after = scale_factors(plan, axis.size)
    for bucket in _by_size(params, plan.bucket_numel):
        wire = dtype or get_comm_dtype(bucket[0])
        values = torch.cat([_grad_or_zeros(p).reshape(-1).to(wire) for p in bucket])
        flat.all_reduce_(values.mul_(before) if before != 1.0 else values, axis)
        if after != 1.0:
            values.mul_(after)
        pieces = values.split([p.numel() for p in bucket])
        for param, piece in zip(bucket, pieces, strict=True):
            _grad_or_zeros(param).copy_(piece.view(param.shape))


def _grad_or_zeros(param: torch.nn.Parameter) -> torch.Tensor:
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad


def _by_size(params: Sequence[torch.nn.Parameter], most: int) -> list[list[torch.nn.Parameter]]:
    """Neighbours of one dtype (on the wire, too) and device, at most `most` elements together."""
    buckets: list[list[torch.nn.Parameter]] = []
    size = 0
    last: object = None
    for param in params:
        kind = (param.dtype, param.device, get_comm_dtype(param))
        if not buckets or size + param.numel() > most or kind != last:
            buckets.append([])
            size, last = 0, kind
        buckets[-1].append(param)
        size += param.numel()
    return buckets
