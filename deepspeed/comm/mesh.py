# SPDX-License-Identifier: Apache-2.0
"""Which ranks work together: one axis a kind of parallelism, over a grid of all ranks.

A rank's place is ``((pipe * D + data) * S + sequence) * T + tensor``: tensor-parallel neighbours are
adjacent ranks (they talk most), pipeline stages are farthest apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepspeed.utils.errors import DeepSpeedCommError, explain


@dataclass(frozen=True)
class Axis:
    """The ranks that one collective runs over, seen from one of them.

    Attributes:
        group: the torch process group; None when the axis has one rank.
        size: number of ranks.
        rank: this process's index among them.
        ranks: their global ranks, in the order of the axis.
        hops: of these ranks the neighbours on this machine, and those at the same place of the other machines, where
            gathers go in two hops, so that each machine gets each piece once; else None.
    """

    group: Any
    size: int
    rank: int
    ranks: tuple[int, ...]
    hops: tuple[Axis, Axis] | None = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, memo: Any) -> Axis:
        """The axis itself: a copy of a module talks to the same ranks."""
        return self

    @staticmethod
    def alone(rank: int = 0) -> Axis:
        """Return the axis of one process, whose global rank is ``rank``."""
        return Axis(group=None, size=1, rank=0, ranks=(rank,))

    @staticmethod
    def of_group(group: Any) -> Axis:
        """Return the axis of an existing torch process group that contains this process.

        Args:
            group: a process group; None is the default group.
        """
        import torch.distributed as dist

        group = dist.group.WORLD if group is None else group
        ranks = tuple(dist.get_process_group_ranks(group))
        return Axis(None if len(ranks) == 1 else group, len(ranks), dist.get_rank(group), ranks)

    def split(self, size: int, world: Axis) -> tuple[Axis, Axis]:
        """Cut this axis into runs of ``size`` neighbours: the own run, and the ranks at the same place of all runs.

        Collective over ``world``, whose ranks may be on different axes of the same kind.

        Args:
            size: ranks of a run; it must divide the axis.
            world: everybody.

        Raises:
            DeepSpeedCommError: ``size`` does not divide the axis.
        """
        own = self.ranks[self.rank]
        if size == self.size:
            return self, Axis.alone(own)
        if size == 1:
            return Axis.alone(own), self
        told: list[Any] = [self.ranks]
        if world.size > 1:
            import torch.distributed as dist

            told = [None] * world.size
            dist.all_gather_object(told, self.ranks, group=world.group)
        within, across = neighbour_grid(sorted(set(told)), size)
        return _join(own, within), _join(own, across)


@dataclass(frozen=True)
class Mesh:
    """All axes of a job, seen from one process.

    Attributes:
        world: all ranks.
        data: ranks that hold the same weights and sequence share, and see different samples.
        sequence: ranks that share each sample's sequence.
        sequence_data: data and sequence together: whom dense gradients are averaged over.
        tensor: ranks that share each layer's weights.
        pipe: ranks that hold the stages of one pipeline.
        expert: name -> ranks that share one set of experts.
        expert_data: name -> ranks that hold the same experts.
        shard, replica: ranks that share ZeRO's shards, and those with equal shards, where these are not all of
            ``sequence_data`` (MiCS, arXiv:2205.00119); else None. Read them through ``state_axes``.
        second: neighbours that share a second, closer copy of sharded params (hpZ, arXiv:2306.10209); else None.
    """

    world: Axis
    data: Axis
    sequence: Axis
    tensor: Axis
    pipe: Axis
    sequence_data: Axis
    expert: Mapping[str, Axis] = field(default_factory=dict)
    expert_data: Mapping[str, Axis] = field(default_factory=dict)
    shard: Axis | None = None
    replica: Axis | None = None
    second: Axis | None = None

    @property
    def state_axes(self) -> tuple[Axis, Axis]:
        """The ranks that share ZeRO's shards of dense params, and those that hold equal shards."""
        if self.shard is not None and self.replica is not None:
            return self.shard, self.replica
        return self.sequence_data, Axis.alone(self.world.ranks[self.world.rank])

    @property
    def model(self) -> Axis:
        """The ranks that hold different parts of one model: a pipeline's stages, else the tensor-parallel ones."""
        return self.pipe if self.pipe.size > 1 else self.tensor

    @property
    def spreads_experts(self) -> bool:
        """Whether ranks hold different experts of one layer."""
        return any(axis.size > 1 for axis in self.expert.values())

    @staticmethod
    def single() -> Mesh:
        """Return the mesh of a job of one process."""
        return Mesh.build(1, 0)

    @staticmethod
    def build(
        world_size: int,
        rank: int,
        *,
        sequence: int = 1,
        tensor: int = 1,
        pipe: int = 1,
        expert: Iterable[int] = (),
    ) -> Mesh:
        """Build the mesh, making the process groups that it needs. Collective: every rank calls it.

        Args:
            world_size: number of ranks of the job.
            rank: this process's rank.
            sequence, tensor, pipe: sizes of these axes; data gets what remains.
            expert: expert-parallel sizes, each giving the axes named ``ep_size_<n>``.

        Raises:
            DeepSpeedCommError: the sizes do not divide the ranks.
        """
        plan = grid(world_size, sequence=sequence, tensor=tensor, pipe=pipe)
        axes = {name: _join(rank, lists) for name, lists in plan.items()}
        experts: dict[str, Axis] = {}
        expert_data: dict[str, Axis] = {}
        for size in expert:
            within, across = expert_grid(plan["sequence_data"], size)
            experts[f"ep_size_{size}"] = _join(rank, within)
            expert_data[f"ep_size_{size}"] = _join(rank, across)
        world = _join(rank, [tuple(range(world_size))])
        return Mesh(world=world, expert=experts, expert_data=expert_data, **axes)

    def expert_axes(self, size: int, data_first: bool = False) -> tuple[Axis, Axis]:
        """Make the axes of ``size`` ranks that share experts, and of those with the same experts.

        Collective: every rank calls it.

        Args:
            size: number of ranks that share one set of experts.
            data_first: put ranks with the same experts, not those that share a set, side by side.

        Raises:
            DeepSpeedCommError: ``size`` does not divide the ranks that see different samples.
        """
        world, rank = self.world.size, self.world.ranks[self.world.rank]
        groups = grid(
            world, sequence=self.sequence.size, tensor=self.tensor.size, pipe=self.pipe.size
        )["sequence_data"]
        within, across = expert_grid(groups, size, data_first)
        return _join(rank, within), _join(rank, across)


def grid(
    world_size: int, *, sequence: int = 1, tensor: int = 1, pipe: int = 1
) -> dict[str, list[tuple[int, ...]]]:
    """Return, for each axis, the lists of ranks that form its groups (together: all ranks once).

    Raises:
        DeepSpeedCommError: the sizes do not divide the ranks.
    """
    model = sequence * tensor * pipe
    if min(world_size, sequence, tensor, pipe) < 1 or world_size % model:
        raise DeepSpeedCommError(
            explain(
                "the parallel sizes do not divide the number of processes",
                got=f"{world_size} processes, sequence={sequence}, tensor={tensor}, pipe={pipe}",
                expected=f"a multiple of {model} processes",
            )
        )
    sizes = {
        "pipe": pipe,
        "data": world_size // model,
        "sequence": sequence,
        "tensor": tensor,
    }
    names = list(sizes)
    stride = {}
    step = 1
    for name in reversed(names):
        stride[name] = step
        step *= sizes[name]

    def lists(*along: str) -> list[tuple[int, ...]]:
        starts, members = [0], [0]
        for name in names:
            offsets = [index * stride[name] for index in range(sizes[name])]
            if name in along:
                members = [m + o for m in members for o in offsets]
            else:
                starts = [s + o for s in starts for o in offsets]
        return [tuple(start + member for member in members) for start in starts]

    axes = {name: lists(name) for name in names}
    axes["sequence_data"] = lists("data", "sequence")
    return axes


def expert_grid(
    groups: Sequence[tuple[int, ...]], expert: int, data_first: bool = False
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Split groups of ranks with the same weights into expert and expert-data groups.

    Args:
        groups: lists of ranks (each the sequence-data ranks of one pipe and tensor index).
        expert: number of ranks that share one set of experts: adjacent ranks of a list.
        data_first: adjacent ranks of a list hold the same experts instead.

    Returns:
        The expert groups, and the groups of ranks that hold the same experts.

    Raises:
        DeepSpeedCommError: ``expert`` does not divide the length of the lists.
    """
    width = len(groups[0])
    if expert < 1 or width % expert:
        raise DeepSpeedCommError(
            explain(
                "the expert-parallel size does not divide the data-parallel ranks",
                got=f"ep_size={expert} with {width} ranks",
                expected=f"a divisor of {width}",
                fix="Change ep_size of the MoE layers, or the number of processes.",
            )
        )
    if data_first:
        across, within = neighbour_grid(groups, width // expert)
        return within, across
    return neighbour_grid(groups, expert)


def neighbour_grid(
    groups: Sequence[tuple[int, ...]], size: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Split lists of ranks into runs of ``size`` neighbours, and the ranks at equal places of a list's runs.

    Raises:
        DeepSpeedCommError: ``size`` does not divide a list's length.
    """
    for ranks in groups:
        if size < 1 or len(ranks) % size:
            raise DeepSpeedCommError(
                explain(
                    "groups of neighbours do not divide the ranks",
                    got=f"groups of {size} among {len(ranks)} ranks",
                    expected=f"a divisor of {len(ranks)}",
                )
            )
    within = [ranks[i : i + size] for ranks in groups for i in range(0, len(ranks), size)]
    across = [ranks[i::size] for ranks in groups for i in range(size)]
    return within, across


# Groups made so far under the current default group: asking for the same ranks again costs nothing.
_made: dict[tuple[int, ...], Any] = {}
_made_under: Any = None


def process_group(ranks: tuple[int, ...]) -> Any:
    """Return the process group of exactly these ranks, made once. Collective over all ranks.

    Raises:
        DeepSpeedCommError: torch.distributed has no default group yet.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise DeepSpeedCommError(
            explain(
                "a group of several processes was asked for before they were joined",
                got=f"ranks {list(ranks)}",
                fix="Call deepspeed.init_distributed() first, under the deepspeed launcher.",
            )
        )
    global _made_under
    if _made_under is not dist.group.WORLD:
        _made.clear()
        _made_under = dist.group.WORLD
    if ranks not in _made:
        everybody = ranks == tuple(range(dist.get_world_size()))
        _made[ranks] = dist.group.WORLD if everybody else dist.new_group(list(ranks))
    return _made[ranks]


def _join(rank: int, lists: Sequence[tuple[int, ...]]) -> Axis:
    """Make the groups of all lists, in the same order on every rank; return this rank's."""
    own = Axis.alone(rank)
    for ranks in lists:
        group = process_group(ranks) if len(ranks) > 1 else None
        if rank in ranks:
            own = Axis(group, len(ranks), ranks.index(rank), ranks)
    return own
