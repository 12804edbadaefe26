# SPDX-License-Identifier: Apache-2.0
"""Ranks on a grid with named axes, and the process groups of a pipeline's grid."""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

from deepspeed import comm as dist
from deepspeed.utils.errors import explain


class ProcessTopology:
    """Ranks numbered in row-major order over named axes; the last axis has neighbouring ranks.

    Args:
        axes: names, the slowest first.
        dims: length of each.
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord = namedtuple("ProcessCoord", self.axes)  # type: ignore[misc]
        places = itertools.product(*(range(dim) for dim in self.dims))
        self.mapping = {self.ProcessCoord(*place): rank for rank, place in enumerate(places)}

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a place.

        Raises:
            ValueError: an axis is missing, or the place is not on the grid.
        """
        if set(coord_kwargs) != set(self.axes):
            raise ValueError(
                explain(
                    "a place needs every axis once; for several ranks there is filter_match()",
                    got=", ".join(coord_kwargs),
                    expected=", ".join(self.axes),
                )
            )
        place = self.ProcessCoord(**coord_kwargs)
        if place not in self.mapping:
            raise ValueError(
                explain("no such place", got=place, expected=f"axes of lengths {self.dims}")
            )
        return self.mapping[place]

    def get_axis_names(self) -> list[str]:
        """The axes, the slowest first."""
        return self.axes

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """A rank's place in words, such as ``model_00``, without the axes that are left out."""
        place = self.get_coord(rank)
        names = [axis for axis in self.axes if axis not in frozenset(omit_axes)]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(place, axis):02d}" for axis in names)

    def get_dim(self, axis: str) -> int:
        """The length of an axis; 0 for one that is not there."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_coord(self, rank: int) -> Any:
        """A rank's place, as a named tuple.

        Raises:
            ValueError: there is no such rank.
        """
        for place, number in self.mapping.items():
            if number == rank:
                return place
        raise ValueError(f"rank {rank} not found in topology of {self.world_size()} ranks")

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """The lists of ranks that differ along `axis` only; nothing for an axis that is not there."""
        if axis not in self.axes:
            return []
        others = [name for name in self.axes if name != axis]
        lists = []
        for values in itertools.product(*(range(self.get_dim(name)) for name in others)):
            fixed = dict(zip(others, values, strict=True))
            lists.append([self.get_rank(**{axis: at}, **fixed) for at in range(self.get_dim(axis))])
        return lists

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """The ranks whose place has the given values."""
        wanted = filter_kwargs.items()
        return [
            rank
            for place, rank in self.mapping.items()
            if all(getattr(place, axis) == value for axis, value in wanted)
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at index `idx` of an axis."""
        return self.filter_match(**{axis: idx})

    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.mapping)

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Stages of a pipeline, each on several data-parallel ranks, which are neighbours."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Stages, data-parallel ranks, and ranks that share each layer's weights, which are neighbours."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])


def _prime_factors(number: int) -> list[int]:
    """The prime factors of a positive number, smallest first.

    Raises:
        ValueError: the number is not positive.
    """
    if number <= 0:
        raise ValueError(explain("only positive numbers have prime factors", got=number))
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def _square_topology(ranks: int) -> ProcessTopology:
    factors = _prime_factors(ranks)
    return PipeDataParallelTopology(math.prod(factors[::2]), math.prod(factors[1::2]))


class PipelineParallelGrid:
    """Process groups along the axes of a topology, with the getters of an `mpu`. Collective: all ranks make it.

    Args:
        topology: the grid; without one, the prime factors of the number of ranks go to stages and data in turn.
        process_group: the ranks; None for all.

    Raises:
        ValueError: the topology has another number of ranks.
    """

    def __init__(self, topology: ProcessTopology | None = None, process_group: Any = None) -> None:
        self.global_rank = dist.get_rank()
        self.world_size = dist.get_world_size(process_group)
        self._topo = topology or _square_topology(self.world_size)
        if not self._is_grid_valid():
            raise ValueError(
                explain(
                    "the topology does not fit the job",
                    got=f"{self._topo.world_size()} places for {self.world_size} ranks",
                    expected="as many places as ranks",
                    fix="choose other axes, or another number of processes",
                )
            )
        self.data_parallel_size = max(self._topo.get_dim("data"), 1)
        self.pipe_parallel_size = max(self._topo.get_dim("pipe"), 1)
        self.model_parallel_size = self.slice_parallel_size = max(self._topo.get_dim("model"), 1)
        self.stage_id, self.data_parallel_id = self.get_stage_id(), self.get_data_parallel_id()
        self.is_first_stage = self.stage_id == 0
        self.is_last_stage = self.stage_id == self.pipe_parallel_size - 1
        self.dp_group, self.dp_proc_group = self._join(self._topo.get_axis_comm_lists("data"))
        self.pp_group, self.pp_proc_group = self._join(self._topo.get_axis_comm_lists("pipe"))
        self.slice_group, self.slice_proc_group = self._join(
            self._topo.get_axis_comm_lists("model")
        )
        whole = [
            sorted(self._topo.get_axis_list("data", index))
            for index in range(self._topo.get_dim("data"))
        ]
        self.model_group, self.ds_model_proc_group = self._join(whole)
        self.ds_model_rank = self.model_group.index(self.global_rank)
        self.ds_model_world_size = len(self.model_group)
        self.p2p_groups = [
            [ranks[at], ranks[(at + 1) % len(ranks)]]
            for ranks in self._topo.get_axis_comm_lists("pipe")
            for at in range(len(ranks))
        ]

    def _is_grid_valid(self) -> bool:
        return self._topo.world_size() == self.world_size

    def _join(self, lists: list[list[int]]) -> tuple[list[int], Any]:
        """Make a group of each list; returns this rank's."""
        own: tuple[list[int], Any] | None = None
        for ranks in lists or [[rank] for rank in range(self.world_size)]:
            group = dist.new_group(ranks)
            if self.global_rank in ranks:
                own = (ranks, group)
        assert own is not None
        return own

    def get_stage_id(self) -> int:
        """This rank's stage."""
        return getattr(self._topo.get_coord(self.global_rank), "pipe", 0)

    def get_data_parallel_id(self) -> int:
        """This rank's place among those of its stage that see different samples."""
        return getattr(self._topo.get_coord(self.global_rank), "data", 0)

    def stage_to_global(self, stage_id: int, **kwargs: int) -> int:
        """The rank of another stage at this rank's place along all other axes."""
        place = self._topo.get_coord(self.global_rank)
        return self._topo.get_rank(**place._replace(pipe=stage_id, **kwargs)._asdict())

    def topology(self) -> ProcessTopology:
        """The grid."""
        return self._topo

    def get_global_rank(self) -> int:
        return self.global_rank

    def get_pipe_parallel_rank(self) -> int:
        return self.stage_id

    def get_pipe_parallel_world_size(self) -> int:
        return self.pipe_parallel_size

    def get_pipe_parallel_group(self) -> Any:
        """The stages of this rank's pipeline."""
        return self.pp_proc_group

    get_pipeline_model_parallel_rank = get_pipe_parallel_rank
    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size

    def get_data_parallel_rank(self) -> int:
        return self.data_parallel_id

    def get_data_parallel_world_size(self) -> int:
        return self.data_parallel_size

    def get_data_parallel_group(self) -> Any:
        """The ranks of this stage that see different samples."""
        return self.dp_proc_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.dp_group

    def get_model_parallel_rank(self) -> int:
        return self.ds_model_rank

    def get_model_parallel_world_size(self) -> int:
        return self.ds_model_world_size

    def get_model_parallel_group(self) -> Any:
        """All ranks that together hold one model."""
        return self.ds_model_proc_group

    def get_slice_parallel_rank(self) -> int:
        return getattr(self._topo.get_coord(self.global_rank), "model", 0)

    def get_slice_parallel_world_size(self) -> int:
        return self.slice_parallel_size

    def get_slice_parallel_group(self) -> Any:
        """The ranks that share each layer's weights."""
        return self.slice_proc_group

    get_tensor_model_parallel_rank = get_slice_parallel_rank
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size
