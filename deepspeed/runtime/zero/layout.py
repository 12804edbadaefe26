# SPDX-License-Identifier: Apache-2.0
"""Where each element of each parameter lives when a training state is cut over ranks: integers only.

A `Layout` orders parameters into one flat range and cuts that range over `world` ranks. Two ways of cutting exist on
disk and in memory, and both answer the same queries:

* `contiguous` (stages 0 to 2): parameters are laid end to end, the total is padded to a multiple of
  `alignment * world`, and every rank owns one equal slice of it.
* `per_param` (stage 3): every parameter is padded to a multiple of `world` and cut by itself; a rank's shard is the
  concatenation of its slices.

No torch, no processes: a checkpoint reader on a laptop and an optimizer on a GPU ask the same object.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of `length` elements of parameter `param`, from `param_start`, found at `shard_start` in `rank`'s shard."""

    param: int
    param_start: int
    rank: int
    shard_start: int
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy `length` elements from `(src_rank, src_start)` of one layout to `(dst_rank, dst_start)` of another."""

    src_rank: int
    src_start: int
    dst_rank: int
    dst_start: int
    length: int


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """The map from parameters to shards. Build one with `Layout.contiguous` or `Layout.per_param`.

    Attributes:
        numels: elements of each parameter, in flat order.
        world: number of ranks that share the state.
        shard_numel: elements of one rank's shard, padding included (equal on all ranks).
        starts: for `contiguous`, where each parameter begins in the flat range; for `per_param`, where each
            parameter's slice begins in a shard.
        cut_per_param: True for the `per_param` way of cutting.
    """

    numels: tuple[int, ...]
    world: int
    shard_numel: int
    starts: tuple[int, ...] = field(repr=False)
    cut_per_param: bool = False

    @classmethod
    def contiguous(cls, numels: Sequence[int], world: int, alignment: int = 2) -> Layout:
        """Parameters end to end, total padded to `alignment * world`, equal slices.

        Raises:
            ValueError: if `world` or `alignment` is below 1, or a size is negative.
        """
        numels = _checked(numels, world)
        if alignment < 1:
            raise ValueError(f"alignment must be at least 1, got {alignment}")
        ends = list(accumulate(numels, initial=0))
        shard = _round_up(ends[-1], alignment * world) // world
        return cls(numels, world, shard, tuple(ends[:-1]))

    @classmethod
    def per_param(cls, numels: Sequence[int], world: int) -> Layout:
        """Each parameter padded to a multiple of `world` and cut by itself.

        Raises:
            ValueError: if `world` is below 1, or a size is negative.
        """
        numels = _checked(numels, world)
        ends = list(accumulate((-(-n // world) for n in numels), initial=0))
        return cls(numels, world, ends[-1], tuple(ends[:-1]), cut_per_param=True)

    @property
    def numel(self) -> int:
        """Elements of all parameters, without padding."""
        return sum(self.numels)

    @property
    def padded_numel(self) -> int:
        """Elements of all shards together."""
        return self.shard_numel * self.world

    def padding(self, rank: int) -> int:
        """Elements of `rank`'s shard that belong to no parameter."""
        return self.shard_numel - sum(s.length for s in self.segments(rank))

    def shard_range(self, rank: int) -> tuple[int, int]:
        """`(start, end)` of a rank's slice of the flat range (contiguous layouts only)."""
        assert not self.cut_per_param
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def segments(self, rank: int) -> list[Segment]:
        """The pieces of parameters in `rank`'s shard, by position in the shard. Empty pieces are left out."""
        return list(
            self._per_param_segments(rank) if self.cut_per_param else self._range_segments(rank)
        )

    def param_segments(self, param: int) -> list[Segment]:
        """The pieces of one parameter on all ranks, by position in the parameter."""
        numel, start = self.numels[param], self.starts[param]
        if self.cut_per_param:
            piece = -(-numel // self.world)
            cuts = (
                (rank, rank * piece, min(numel, (rank + 1) * piece)) for rank in range(self.world)
            )
            return [Segment(param, lo, rank, start, hi - lo) for rank, lo, hi in cuts if lo < hi]
        found, done = [], 0
        while done < numel:
            rank, offset = divmod(start + done, self.shard_numel)
            length = min(numel - done, self.shard_numel - offset)
            found.append(Segment(param, done, rank, offset, length))
            done += length
        return found

    def reshard(self, new_world: int) -> Iterator[Copy]:
        """The copies that turn shards of this layout into shards of the same layout over `new_world` ranks."""
        make = Layout.per_param if self.cut_per_param else Layout.contiguous
        return self.copies_to(make(self.numels, new_world))

    def copies_to(self, other: Layout) -> Iterator[Copy]:
        """The copies that turn shards of this layout into shards of `other`, whatever its world and way of cutting.

        Raises:
            ValueError: if the two layouts do not hold the same parameters.
        """
        if self.numels != other.numels:
            raise ValueError(
                f"layouts hold different parameters: {len(self.numels)} of {self.numel} elements here, "
                f"{len(other.numels)} of {other.numel} there"
            )
        for param in range(len(self.numels)):
            yield from _overlaps(self.param_segments(param), other.param_segments(param))

    def params_between(self, start: int, end: int) -> range:
        """Indices of the parameters that touch `[start, end)` of the flat range (contiguous layouts only)."""
        assert not self.cut_per_param
        if start >= end:
            return range(0)
        first = bisect_right(self.starts, start) - 1
        last = bisect_right(self.starts, end - 1)
        return range(max(first, 0), last)

    def _per_param_segments(self, rank: int) -> Iterator[Segment]:
        for param, (numel, start) in enumerate(zip(self.numels, self.starts, strict=True)):
            piece = -(-numel // self.world)
            lo, hi = min(numel, rank * piece), min(numel, (rank + 1) * piece)
            if lo < hi:
                yield Segment(param, lo, rank, start, hi - lo)

    def _range_segments(self, rank: int) -> Iterator[Segment]:
        begin, end = self.shard_range(rank)
        for param in self.params_between(begin, end):
            lo = max(self.starts[param], begin)
            hi = min(self.starts[param] + self.numels[param], end)
            if lo < hi:
                yield Segment(param, lo - self.starts[param], rank, lo - begin, hi - lo)


def round_robin_order(count: int, world: int) -> list[int]:
    """The order in which `count` parameters are laid so that neighbours in the backward pass go to different ranks."""
    return [index for rank in range(world) for index in range(rank, count, world)]


def _checked(numels: Sequence[int], world: int) -> tuple[int, ...]:
    if world < 1:
        raise ValueError(f"world must be at least 1, got {world}")
    if any(n < 0 for n in numels):
        raise ValueError(f"parameter sizes must not be negative, got {min(numels)}")
    return tuple(int(n) for n in numels)


def _overlaps(sources: list[Segment], targets: list[Segment]) -> Iterator[Copy]:
    """Walk two cuts of the same parameter in step and yield what they have in common."""
    i = j = 0
    while i < len(sources) and j < len(targets):
        a, b = sources[i], targets[j]
        lo = max(a.param_start, b.param_start)
        a_end, b_end = a.param_start + a.length, b.param_start + b.length
        hi = min(a_end, b_end)
        if lo < hi:
            yield Copy(
                a.rank,
                a.shard_start + lo - a.param_start,
                b.rank,
                b.shard_start + lo - b.param_start,
                hi - lo,
            )
        i, j = i + (a_end <= b_end), j + (b_end <= a_end)
