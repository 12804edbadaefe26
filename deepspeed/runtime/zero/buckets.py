# SPDX-License-Identifier: Apache-2.0
"""Runs of parameters whose gradients travel together, in the three forms that layouts need."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepspeed.comm import flat
from deepspeed.runtime.torch_autocast import get_comm_dtype

from .blocks import Blocks
from .own_slice import shape_of
from .plan import Plan
from .quantized_sum import ErrorFeedback, QuantizedSum, RowCodec
from .shard_group import ShardGroup
from .slab import store


class Bucket:
    """Neighbouring parameters of a group, `first` up to but not including `last`.

    Attributes:
        indices: the parameters.
        wire_dtype: in which their gradients travel.
        missing: how many gradients have not arrived in this round.
        arrived: which have.
        launched: whether the collective of this round has started.
        fresh: whether the shard's gradients are those of an earlier step, to be overwritten.
        blocks: where buffers come from; buckets of one reducer share them, and fill the same ones in turn.
    """

    def __init__(self, group: ShardGroup, first: int, last: int, plan: Plan) -> None:
        self.group = group
        self.wire_dtype = wire_dtype(group, first)
        self.indices = range(first, last)
        self.missing = len(self.indices)
        self.arrived: set[int] = set()
        self.launched = False
        self.fresh = True
        self.buffer: torch.Tensor | None = None
        self.blocks = Blocks()
        ranks = group.shard_axis.size * group.replica_axis.size
        self.before, self.after = scale_factors(plan, ranks)

    def restart(self) -> None:
        """Begin a round of collectives."""
        self.missing, self.launched = len(self.indices), False
        self.arrived.clear()

    def begin_step(self) -> None:
        """Gradients from now on are those of another step."""
        self.fresh = True

    def before_adding(self) -> None:
        """Gradients are added to what is here, in this round or without one."""

    def collect(self, index: int, gradients: Sequence[torch.Tensor]) -> None:
        """Add a parameter's gradients to the round."""
        fresh = index not in self.arrived
        self.arrived.add(index)
        self.missing -= fresh
        for values in gradients:
            self._put(index, values.reshape(-1), fresh)
            fresh = False

    def lack(self, index: int) -> None:
        """A parameter has no gradient in this round."""
        raise NotImplementedError

    def launch(self) -> flat.Handle:
        """Start the collective."""
        raise NotImplementedError

    def land(self) -> None:
        """The collective is over: put what is ours into the group's gradients."""
        raise NotImplementedError

    def drop(self) -> None:
        """Forget what was collected and not landed."""
        self.buffer = None

    def _put(self, index: int, values: torch.Tensor, fresh: bool) -> None:
        raise NotImplementedError

    def _landed(self) -> None:
        if self.fresh:
            self.group.renew_grads()
        self.fresh = False

    def _buffer(self, numel: int) -> torch.Tensor:
        if self.buffer is None:
            self.buffer = self.blocks.take(numel, self.wire_dtype, self.group.device)
        return self.buffer

    def forget_losses(self) -> None:
        """Nothing that codes lost is to be made up for; see `QuantizedSum.forget_losses`."""

    def _over_replicas(self, values: torch.Tensor, pending: flat.Handle) -> flat.Handle:
        """What is summed over the shard axis is summed over the ranks that hold equal shards, too."""
        if self.group.replica_axis.size == 1:
            return pending
        pending.wait()
        return flat.all_reduce_(values, self.group.replica_axis, async_op=True)


class SlabBucket(Bucket):
    """Gradients that every rank keeps whole: summed where they lie (stage 0).

    Where a mean is taken, another sum leaves what was averaged before as it is. Any other sum would count it several
    times, so its part of the next one is taken first.
    """

    def __init__(self, group: ShardGroup, first: int, last: int, plan: Plan) -> None:
        super().__init__(group, first, last, plan)
        self._repeats = repeats(plan, group.replica_axis.size)
        self._summed = False

    def begin_step(self) -> None:
        """Gradients from now on are those of another step."""
        super().begin_step()
        self._summed = False

    def before_adding(self) -> None:
        """What is a sum becomes this rank's part of it."""
        if self._summed and self._repeats != 1:
            self._run().div_(self._repeats)
        self._summed = False

    def _put(self, index: int, values: torch.Tensor, fresh: bool) -> None:
        self.before_adding()
        self.group.add_param_grad(index, values)

    def lack(self, index: int) -> None:
        """Gradients of the step before must not count again."""
        self.group.clear_unwritten()

    def launch(self) -> flat.Handle:
        """Start the sum over the replicas."""
        self.before_adding()
        self.buffer = self._run().to(self.wire_dtype)
        if self.before != 1.0:
            self.buffer.mul_(self.before)
        return self._over_replicas(self.buffer, flat.DONE)

    def land(self) -> None:
        """Put the sum back into the slab."""
        values, self.buffer = self.buffer, None
        assert values is not None
        if self.after != 1.0:
            values.mul_(self.after)
        run = self._run()
        if values.data_ptr() != run.data_ptr():
            run.copy_(values)
        self._summed = True

    def _run(self) -> torch.Tensor:
        layout = self.group.layout
        last = self.indices[-1]
        start, end = layout.starts[self.indices[0]], layout.starts[last] + layout.numels[last]
        (part,) = self.group.parts
        return self.group.grad_of(part).narrow(0, start, end - start)


class RangeBucket(Bucket):
    """A run of a flat range that is cut at equal distances: each piece goes to the rank that owns it (stages 1, 2)."""

    def __init__(self, group: ShardGroup, first: int, last: int, plan: Plan) -> None:
        super().__init__(group, first, last, plan)
        layout = group.layout
        self.start = layout.starts[first]
        self.end = layout.starts[last - 1] + layout.numels[last - 1]

    def segments(self) -> list[tuple[int, int, int]]:
        """Who owns what: `(rank in the shard axis, start in the buffer, length)`."""
        shard = self.group.layout.shard_numel
        owned, at = [], self.start
        while at < self.end:
            rank = at // shard
            stop = min(self.end, (rank + 1) * shard)
            owned.append((rank, at - self.start, stop - at))
            at = stop
        return owned

    def _place(self, index: int) -> torch.Tensor:
        layout = self.group.layout
        buffer = self._buffer(self.end - self.start)
        return buffer.narrow(0, layout.starts[index] - self.start, layout.numels[index])

    def _put(self, index: int, values: torch.Tensor, fresh: bool) -> None:
        store(self._place(index), values, fresh)

    def lack(self, index: int) -> None:
        """It counts as zero."""
        self._place(index).zero_()

    def launch(self) -> flat.Handle:
        """Start the sum onto the owners."""
        buffer, group = self._buffer(self.end - self.start), self.group
        if self.before != 1.0:
            buffer.mul_(self.before)
        pending = flat.reduce_to_owners(buffer, self.segments(), group.shard_axis, async_op=True)
        return self._over_replicas(buffer, pending)

    def land(self) -> None:
        """Keep our own pieces."""
        values, self.buffer = self.buffer, None
        assert values is not None
        rank, shard = self.group.shard_axis.rank, self.group.layout.shard_numel
        for owner, start, length in self.segments():
            if owner == rank:
                own = values.narrow(0, start, length)
                if self.after != 1.0:
                    own.mul_(self.after)
                self.group.add_shard_grad(self.start + start - rank * shard, own, self.fresh)
        self._landed()


class SliceBucket(Bucket):
    """Parameters that are cut one by one: a row for each rank, summed onto it (stage 3)."""

    def __init__(self, group: ShardGroup, first: int, last: int, plan: Plan) -> None:
        super().__init__(group, first, last, plan)
        starts = group.layout.starts
        self.start = starts[first]
        self.row = (starts[last] if last < len(starts) else group.layout.shard_numel) - self.start
        self.sum: torch.Tensor | None = None
        self._reduce = self._codes(plan) if plan.gradient_bits else flat.reduce_scatter_into

    def _codes(self, plan: Plan) -> QuantizedSum:
        """Matrices travel as codes."""
        layout, ranks = self.group.layout, self.group.shard_axis.size
        matrices = [
            (layout.starts[index] - self.start, -(-layout.numels[index] // ranks))
            for index in self.indices
            if len(shape_of(self.group.params[index])) > 1
        ]
        feedback = ErrorFeedback(*plan.error_feedback) if plan.error_feedback else None
        return QuantizedSum(RowCodec.of(self.row, matrices, plan.gradient_bits), feedback)

    def forget_losses(self) -> None:
        """See `QuantizedSum.forget_losses`."""
        if isinstance(self._reduce, QuantizedSum):
            self._reduce.forget_losses()

    def _rows(self, index: int) -> torch.Tensor:
        ranks, layout = self.group.shard_axis.size, self.group.layout
        piece = -(-layout.numels[index] // ranks)
        rows = self._buffer(ranks * self.row).view(ranks, self.row)
        return rows.narrow(1, layout.starts[index] - self.start, piece)

    def _put(self, index: int, values: torch.Tensor, fresh: bool) -> None:
        rows = self._rows(index)
        piece = rows.shape[1]
        whole = values.numel() // piece if piece else 0
        store(rows[:whole], values[: whole * piece].view(whole, piece), fresh)
        rest = values[whole * piece :]
        if rest.numel():
            store(rows[whole, : rest.numel()], rest, fresh)
        if fresh and whole < len(rows):
            rows[whole, rest.numel() :].zero_()
            rows[whole + 1 :].zero_()

    def lack(self, index: int) -> None:
        """It counts as zero."""
        self._rows(index).zero_()

    def launch(self) -> flat.Handle:
        """Start the sum, a row to a rank."""
        buffer, axis = self._buffer(self.group.shard_axis.size * self.row), self.group.shard_axis
        if self.before != 1.0:
            buffer.mul_(self.before)
        self.sum = self.blocks.take(self.row, buffer.dtype, buffer.device)
        pending = self._reduce(self.sum, buffer, axis, async_op=True)
        return self._over_replicas(self.sum, pending)

    def drop(self) -> None:
        """Forget what was collected and not landed."""
        super().drop()
        self.sum = None

    def land(self) -> None:
        """Keep our own row."""
        values, self.sum = self.sum, None
        self.buffer = None
        assert values is not None
        if self.after != 1.0:
            values.mul_(self.after)
        self.group.add_shard_grad(self.start, values, self.fresh)
        self._landed()


def cut_buckets(group: ShardGroup, plan: Plan) -> list[Bucket]:
    """Cut a group's parameters into buckets of the plan's size (or of one parameter), last parameters first.

    Gradients that travel in different dtypes are never in one bucket.
    """
    if group.shard_axis.size == 1:
        kind: type[Bucket] = SlabBucket
    else:
        kind = SliceBucket if group.params_sharded else RangeBucket
    buckets: list[Bucket] = []
    numels = group.layout.numels
    last, size = len(numels), 0
    for index in reversed(range(len(numels))):
        other = last > index + 1 and wire_dtype(group, index) != wire_dtype(group, index + 1)
        if other or (size and size + numels[index] > plan.bucket_numel):
            buckets.append(kind(group, index + 1, last, plan))
            last, size = index + 1, 0
        size += numels[index]
    if last:
        buckets.append(kind(group, 0, last, plan))
    return buckets


def wire_dtype(group: ShardGroup, index: int) -> torch.dtype:
    """The dtype in which a parameter's gradient travels: what is configured, or autocast's, or its own."""
    return group.precision.reduce_dtype(get_comm_dtype(group.params[index]))


def scale_factors(plan: Plan, ranks: int) -> tuple[float, float]:
    """What gradients are multiplied by before and after the sum over `ranks`."""
    if plan.gradient_op == "sum":
        return 1.0, 1.0
    averaged = ranks / plan.summed_ranks
    if plan.prescale or (plan.stage > 0 and plan.predivide_factor == 1.0):
        return 1.0 / averaged, 1.0
    return 1.0 / plan.predivide_factor, plan.predivide_factor / averaged


def repeats(plan: Plan, ranks: int) -> int:
    """How many times another sum over `ranks` counts what was summed before."""
    return ranks if plan.gradient_op == "sum" else plan.summed_ranks
