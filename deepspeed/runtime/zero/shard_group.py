# SPDX-License-Identifier: Apache-2.0
"""The parameters that move and step together, with everything the optimizer keeps of them.

A `ShardGroup` owns this rank's shard of parameters, of master weights and of gradients. Below stage 3 the shard of
parameters is a slice of a slab that holds all of them (the parameters are views of it); at stage 3 it is all there is.
Stage 0 is the group whose shard axis has one rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.ops.norms import squared_norm
from deepspeed.runtime.precision import Precision

from .host_copies import Incoming, pieces_for
from .layout import Layout, round_robin_order
from .own_slice import hold, numel_of, piece_of, slice_of
from .plan import Placement, Plan, TierKind
from .slab import Slab, store
from .spill import SpilledGrad, SpilledStates, SpillFolder
from .tiers import DeviceTier, Tier, tier_for


@dataclass
class ShardPart:
    """A run of this rank's shard that lives in one tier and is one flat parameter of the inner optimizer.

    Attributes:
        start, length: position in the shard, padding included.
        tier: where master weights, gradients and optimizer states of this run live.
        master: flat weights that the inner optimizer steps; they alias the param slab where dtype and tier allow.
        low: where the stepped weights go in the parameters' dtype; None where `master` aliases the param slab, and
            where the parameters live in files.
        spilled: the file that holds master and states between steps; None for memory.
        spilled_grad: the file that holds the gradients until the step; None for memory.
        held_grad: flat gradients in memory, in the accumulation dtype; None until the first one arrives.
        stale: `held_grad` is of an earlier step, memory that waits for the next gradients.
    """

    start: int
    length: int
    tier: Tier
    master: torch.nn.Parameter
    low: torch.Tensor | None
    spilled: SpilledStates | None = None
    spilled_grad: SpilledGrad | None = None
    held_grad: torch.Tensor | None = None
    stale: bool = False

    @property
    def grad(self) -> torch.Tensor | None:
        """Flat gradients in the accumulation dtype (read from their file, if they have one); None if there are none."""
        if self.spilled_grad is None:
            return None if self.stale else self.held_grad
        return self.spilled_grad.values() if self.spilled_grad.present else None

    @property
    def has_grad(self) -> bool:
        """Whether there are gradients; reads nothing."""
        if self.spilled_grad is None:
            return self.held_grad is not None and not self.stale
        return self.spilled_grad.present

    @property
    def lowers_to_gpu(self) -> bool:
        """Whether stepped weights go from the host to a GPU."""
        return self.low is not None and self.low.is_cuda and self.master.is_cpu

    def forget_grad(self) -> None:
        """Give the gradients' memory back."""
        self.held_grad, self.stale = None, False
        if self.spilled_grad is not None:
            self.spilled_grad.forget()


class ShardGroup:
    """Parameters of one dtype and one group of the user's optimizer.

    Args:
        params: parameters that require gradients, all of one dtype, on `device`.
        param_group_index: which group of the inner optimizer they belong to.
        shard_axis: ranks that share the states.
        replica_axis: ranks that hold equal shards and average their gradients.
        plan: the ZeRO row.
        precision: dtypes.
        device: where the model computes.
        folder: where states live in files, if the plan says so.

    Attributes:
        incoming: gradients on their way to host memory; there are none between backward passes.
        on_stored: called with a part, and the start and length of the run of it that reduced gradients came to.
        on_edit: called before the reduced gradients are edited.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        param_group_index: int,
        shard_axis: Axis,
        replica_axis: Axis,
        plan: Plan,
        precision: Precision,
        device: torch.device,
        folder: SpillFolder | None = None,
    ) -> None:
        self.client_order = list(params)
        order = range(len(params))
        if plan.round_robin and plan.params is not Placement.SHARDED and shard_axis.size > 1:
            order = round_robin_order(len(params), shard_axis.size)
        self.params = [params[i] for i in order]
        self.param_group_index = param_group_index
        self.shard_axis, self.replica_axis = shard_axis, replica_axis
        self.plan, self.precision = plan, precision
        self.dtype = self.params[0].dtype
        self.accumulate_dtype = precision.accumulate_dtype(self.dtype)
        self.incoming = Incoming()
        self.params_sharded = plan.params is Placement.SHARDED
        cut = Layout.per_param if self.params_sharded else Layout.contiguous
        self.layout = cut([numel_of(p) for p in self.params], shard_axis.size)
        self.device, self.folder = device, folder
        self.param_slab: Slab | None = None if self.params_sharded else self._adopt_params(device)
        self.own = (
            self._adopt_slices()
            if self.param_slab is None
            else self.param_slab.shard(shard_axis.rank)
        )
        self.parts = self._cut_parts(device)
        self._written = bytearray(len(self.params))
        self._targets = self._param_targets() if shard_axis.size == 1 else []
        self.on_stored: Callable[[ShardPart, int, int], None] | None = None
        self.on_edit: Callable[[], None] | None = None

    # - construction

    def _adopt_params(self, device: torch.device) -> Slab:
        slab = Slab(self.layout, [p.shape for p in self.params], self.dtype, DeviceTier(device))
        for index, param in enumerate(self.params):
            view = slab.view(index)
            view.copy_(param.data)
            param.data = view
        return slab

    def _adopt_slices(self) -> torch.Tensor | None:
        """Re-house the slices of sharded parameters, one behind the other, in one flat buffer; None for files."""
        if any(p.ds_spill is not None for p in self.params):
            return None
        tier = tier_for(self.device, self.plan.param_tier is TierKind.HOST, self.plan.pin_memory)
        own = tier.alloc(self.layout.shard_numel, self.dtype)
        for param, start in zip(self.params, self.layout.starts, strict=True):
            slice_ = own.narrow(0, start, param.ds_tensor.numel())
            slice_.copy_(param.ds_tensor)
            hold(param, slice_)
        return own

    def _cut_parts(self, device: torch.device) -> list[ShardPart]:
        total, most = self.layout.shard_numel, self.plan.part_of(self.layout.shard_numel)
        off_device = self.plan.state_tier is not TierKind.DEVICE
        split = total - round(total * self.plan.host_ratio) if off_device else total
        runs = [(0, split, False), (split, total - split, True)]
        cuts = [
            (start + at, min(most, length - at), off)
            for start, length, off in runs
            for at in range(0, length, most)
        ]
        return [self._make_part(*cut, device) for cut in cuts or [(0, 0, False)]]

    def _make_part(
        self, start: int, length: int, off_device: bool, device: torch.device
    ) -> ShardPart:
        tier = tier_for(device, off_device, self.plan.pin_memory)
        own = self.read_own(start, length)
        low = None if self.own is None else own
        master_dtype = self.precision.master_dtype(self.dtype)
        spilled = off_device and self.plan.state_tier is TierKind.FILE
        in_place = master_dtype == self.dtype and tier.device.type == own.device.type
        in_place = in_place and not self.plan.masters_apart
        if in_place and low is not None and not spilled:
            return ShardPart(start, length, tier, _flat_param(own), low=None)
        master = tier.alloc(length, master_dtype)
        master.copy_(own)
        part = ShardPart(start, length, tier, _flat_param(master), low)
        if spilled:
            assert self.folder is not None
            part.spilled = SpilledStates(self.folder, self.folder.new_name(), part.master)
            # Ranks that hold equal shards sum their gradients in place.
            if self.shard_axis.size > 1 or self.replica_axis.size == 1:
                name = f"grad_{self.folder.new_name()}"
                part.spilled_grad = SpilledGrad(self.folder, name, length, self.accumulate_dtype)
        return part

    def _param_targets(self) -> list[list[tuple[ShardPart, int, int, int]]]:
        """For each parameter, the runs `(part, start in part, start in param, length)` that hold its gradient."""
        found: list[list[tuple[ShardPart, int, int, int]]] = [[] for _ in self.params]
        for segment in self.layout.segments(self.shard_axis.rank):
            for part, offset, within, length in self.runs(segment.shard_start, segment.length):
                found[segment.param].append((part, within, segment.param_start + offset, length))
        return found

    def runs(self, shard_start: int, length: int) -> list[tuple[ShardPart, int, int, int]]:
        """Cut `[shard_start, shard_start + length)` at part borders: `(part, offset in the run, start in part, length)`."""
        runs = []
        for part in self.parts:
            lo = max(shard_start, part.start)
            hi = min(shard_start + length, part.start + part.length)
            if lo < hi:
                runs.append((part, lo - shard_start, lo - part.start, hi - lo))
        return runs

    # - gradients

    def grad_of(self, part: ShardPart) -> torch.Tensor:
        """The gradients of `part`: the buffer they add up in, made on first use, or a copy of what is in their file."""
        if part.spilled_grad is not None:
            return part.spilled_grad.values()
        self.incoming.settle()
        return self._sums(part)

    def _sums(self, part: ShardPart) -> torch.Tensor:
        if part.held_grad is None:
            part.held_grad = part.tier.alloc(part.length, self.accumulate_dtype)
        return part.held_grad

    def grads(self) -> list[torch.Tensor] | None:
        """The gradients of all parts; None if some have none."""
        there = all(part.has_grad for part in self.parts)
        return [self.grad_of(part) for part in self.parts] if there else None

    @contextlib.contextmanager
    def grads_in_memory(self, edit: bool = False) -> Iterator[None]:
        """Extent in which the gradients of all parts are in memory; `edit` keeps what is written to them there."""
        self.incoming.settle()
        spilled = [part.spilled_grad for part in self.parts if part.spilled_grad is not None]
        if edit and self.on_edit is not None:
            self.on_edit()
        try:
            yield
            for grad in spilled if edit else ():
                grad.keep()
        finally:
            for grad in spilled:
                grad.let_go()

    def square_of(self, part: ShardPart) -> torch.Tensor:
        """The sum of the squares of a part's gradients, 0-dim float64."""
        if part.spilled_grad is not None:
            return part.spilled_grad.square()
        return squared_norm(self.grad_of(part))

    def renew_grads(self) -> None:
        """The gradients are no longer those of an earlier step; a part that is nothing but padding has some, too."""
        for part in self.parts:
            part.stale = False
            if part.spilled_grad is None:
                self._sums(part)

    def _store(self, part: ShardPart, start: int, values: torch.Tensor, fresh: bool) -> None:
        if part.spilled_grad is not None:
            part.spilled_grad.store(start, values, fresh)
            return
        part.stale = False
        target = self._sums(part).narrow(0, start, values.numel())
        stored = partial(self._stored, part, start, values.numel())
        if values.is_cuda and target.is_cpu:
            self.incoming.send(values, target, fresh, stored)
            return
        store(target, values, fresh)
        stored()

    def _stored(self, part: ShardPart, start: int, length: int) -> None:
        if self.on_stored is not None:
            self.on_stored(part, start, length)

    def add_param_grad(self, index: int, grad: torch.Tensor) -> None:
        """Add a parameter's whole gradient to the unsharded gradient slab (shard axis of one rank)."""
        values = grad.reshape(-1)
        fresh = not self._written[index]
        for part, start, param_start, length in self._targets[index]:
            self._store(part, start, values.narrow(0, param_start, length), fresh)
        self._written[index] = 1

    def set_param_grad(self, index: int, grad: torch.Tensor) -> None:
        """Put a gradient in place of what added up of a parameter's (shard axis of one rank)."""
        self._written[index] = 0
        self.add_param_grad(index, grad)
        self.incoming.settle()

    def forget_param_grad(self, index: int) -> None:
        """A parameter has had no gradient since the last step (shard axis of one rank)."""
        self._written[index] = 0

    def view_param_grad(self, index: int) -> torch.Tensor | None:
        """Where a parameter's gradient adds up, in its shape; None if there is none, or not in one piece on its device in
        its dtype (shard axis of one rank)."""
        param, targets = self.params[index], self._targets[index]
        if not self._written[index] or len(targets) != 1 or self.accumulate_dtype != param.dtype:
            return None
        part, start, _, length = targets[0]
        held = part.held_grad
        if held is None or part.stale or held.device != param.device:
            return None
        return held.narrow(0, start, length).view(param.shape)

    def add_shard_grad(self, shard_start: int, values: torch.Tensor, fresh: bool) -> None:
        """Add reduced gradients to this rank's shard, or overwrite what an earlier step left there."""
        for part, offset, start, length in self.runs(shard_start, values.numel()):
            self._store(part, start, values.narrow(0, offset, length), fresh)

    def clear_unwritten(self) -> None:
        """Zero the gradients of what took no part since the last step: of parameters, where this rank has all of them
        whole, else of a shard that nothing was reduced into."""
        self.incoming.settle()
        if self.shard_axis.size > 1:
            self._clear_stale()
            return
        for index, written in enumerate(self._written):
            if not written:
                for part, start, _, length in self._targets[index]:
                    if part.spilled_grad is not None:
                        part.spilled_grad.clear(start, length)
                    elif part.held_grad is not None:
                        part.held_grad.narrow(0, start, length).zero_()
                self._written[index] = 1
        self.renew_grads()

    def _clear_stale(self) -> None:
        for part in self.parts:
            if part.spilled_grad is not None:
                if part.length and not part.spilled_grad.present:
                    part.spilled_grad.clear(0, part.length)
            elif part.stale and part.held_grad is not None:
                part.held_grad.zero_()
        self.renew_grads()

    def forget_grads(self, release: bool) -> None:
        """Start a new accumulation; `release` gives the memory back."""
        self.incoming.settle()
        self._written = bytearray(len(self.params))
        for part in self.parts:
            part.stale = True
            if release or part.spilled_grad is not None:
                part.forget_grad()

    # - weights

    def read_own(self, start: int, length: int) -> torch.Tensor:
        """A run of this rank's shard of the parameters: a view, or a copy put together from files."""
        if self.own is not None:
            return self.own.narrow(0, start, length)
        values = torch.zeros(length, dtype=self.dtype, device="cpu")
        for param, within, at, count in self._slices(start, length):
            values.narrow(0, at, count).copy_(slice_of(param).narrow(0, within, count))
        return values

    def write_own(self, start: int, values: torch.Tensor) -> None:
        """Overwrite a run of this rank's shard of the parameters."""
        if self.own is not None:
            self.own.narrow(0, start, values.numel()).copy_(values)
            return
        for param, within, at, count in self._slices(start, values.numel()):
            param.ds_spill.write(within, values.narrow(0, at, count).to(self.dtype))

    def _slices(
        self, start: int, length: int
    ) -> Iterator[tuple[torch.nn.Parameter, int, int, int]]:
        """The parameters' slices in a run of the shard: `(param, start in slice, start in run, length)`."""
        for param, begin in zip(self.params, self.layout.starts, strict=True):
            lo, hi = max(start, begin), min(start + length, begin + piece_of(param))
            if lo < hi:
                yield param, lo - begin, lo - start, hi - lo

    def publish(self) -> flat.Handle:
        """Bring the stepped shards of all ranks into the params; wait on what is returned before using them.

        Sharded parameters are gathered when they are next used.
        """
        if self.param_slab is None:
            return flat.DONE
        assert self.own is not None
        return flat.all_gather_into(self.param_slab.flat, self.own, self.shard_axis, async_op=True)

    def masters_from_params(self) -> None:
        """Take the current values of the params as the masters' (after something wrote to the params)."""
        for part in self.parts:
            if part.low is not None or self.own is None:
                part.master.data.copy_(self.read_own(part.start, part.length))

    def take_param(self, index: int) -> None:
        """Take one parameter's own slice as its master's value (after the slice was edited)."""
        for segment in self.layout.segments(self.shard_axis.rank):
            if segment.param == index:
                for part, offset, start, length in self.runs(segment.shard_start, segment.length):
                    if part.low is not None or self.own is None:
                        source = self.read_own(segment.shard_start + offset, length)
                        part.master.data.narrow(0, start, length).copy_(source)

    def lower_param(self, index: int) -> None:
        """Write one parameter's master to its own slice (after the master was edited)."""
        for segment in self.layout.segments(self.shard_axis.rank):
            if segment.param == index:
                for part, offset, start, length in self.runs(segment.shard_start, segment.length):
                    if part.low is not None or self.own is None:
                        values = part.master.data.narrow(0, start, length)
                        self.write_own(segment.shard_start + offset, values)

    def params_from_masters(self) -> None:
        """Take the masters' values as those of the params, on all ranks."""
        for part in self.parts:
            self.lower(part)
        self.publish().wait()

    def lower(self, part: ShardPart) -> None:
        """Write a part's master weights to the params' shard, in the params' dtype."""
        if part.lowers_to_gpu:
            for start, piece in pieces_for(part.low):
                piece.copy_(part.master.data.narrow(0, start, piece.numel()))
        elif part.low is not None:
            part.low.copy_(part.master.data)
        elif self.own is None:
            self.write_own(part.start, part.master.data)

    @property
    def padding(self) -> int:
        """Elements at the end of this rank's shard that belong to no parameter."""
        return self.layout.padding(self.shard_axis.rank)


def _flat_param(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.detach(), requires_grad=True)
