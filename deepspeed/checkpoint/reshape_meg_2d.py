# SPDX-License-Identifier: Apache-2.0
"""Grids of pipeline stages and tensor-parallel ranks, and how one is folded into a smaller one."""

from __future__ import annotations

from typing import Any

from .reshape_utils import check, partition_data


class meg_2d_parallel_map:
    """Lists of data at the places of a grid.

    Args:
        pp_degree: pipeline stages.
        tp_degree: ranks that cut single parameters.

    Attributes:
        map: the lists, by "stage,rank".
    """

    def __init__(self, pp_degree: int, tp_degree: int) -> None:
        self.pp_degree = pp_degree
        self.tp_degree = tp_degree
        self.map: dict[str, list[Any]] = {}

    def simple_init(self) -> None:
        """Number the places, tensor-parallel ranks first."""
        self.map = {
            self._key(p, t): [p * self.tp_degree + t]
            for p in range(self.pp_degree)
            for t in range(self.tp_degree)
        }

    def add_data(self, pp_index: int, tp_index: int, data: list[Any]) -> None:
        """Append a list's items to a place.

        Raises:
            AssertionError: no such place, or no list.
        """
        self._check_place(pp_index, tp_index)
        check(isinstance(data, list), "data of a place is a list", got=type(data).__name__)
        self.map.setdefault(self._key(pp_index, tp_index), []).extend(data)

    def get_data(self, pp_index: int | None = None, tp_index: int | None = None) -> list[Any]:
        """The items of a place, or of a whole stage, rank or grid where an index is left out."""
        stages = range(self.pp_degree) if pp_index is None else [pp_index]
        ranks = range(self.tp_degree) if tp_index is None else [tp_index]
        found = []
        for p in stages:
            for t in ranks:
                self._check_place(p, t)
                found.extend(self.map[self._key(p, t)])
        return found

    def print_data(self, tag: str) -> None:
        """Print all places."""
        print(tag)
        for key, value in self.map.items():
            print(f"{key} = {value}")

    def _check_place(self, pp_index: int, tp_index: int) -> None:
        check(
            0 <= pp_index < self.pp_degree and 0 <= tp_index < self.tp_degree,
            "no such place in the grid",
            got=f"stage {pp_index}, rank {tp_index}",
            expected=f"below {self.pp_degree}, {self.tp_degree}",
        )

    @staticmethod
    def _key(pp_index: int, tp_index: int) -> str:
        return f"{pp_index},{tp_index}"


def reshape_meg_2d_parallel(
    old_pp_degree: int,
    old_tp_degree: int,
    new_pp_degree: int,
    new_tp_degree: int,
    verbose: bool = False,
) -> meg_2d_parallel_map:
    """Fold a numbered grid into a smaller one: first neighbours of a stage, then neighbouring stages.

    Raises:
        AssertionError: the new degrees do not divide the old ones.
    """
    old = meg_2d_parallel_map(old_pp_degree, old_tp_degree)
    old.simple_init()
    return fold(old, new_pp_degree, new_tp_degree, verbose)


def fold(
    old: meg_2d_parallel_map, pp_degree: int, tp_degree: int, verbose: bool = False
) -> meg_2d_parallel_map:
    """As `reshape_meg_2d_parallel`, of any data."""
    narrow = meg_2d_parallel_map(old.pp_degree, tp_degree)
    for p in range(old.pp_degree):
        places = [old.get_data(p, t) for t in range(old.tp_degree)]
        for t, part in enumerate(partition_data(places, tp_degree)):
            narrow.add_data(p, t, [item for place in part for item in place])
    final = meg_2d_parallel_map(pp_degree, tp_degree)
    for t in range(tp_degree):
        places = [narrow.get_data(p, t) for p in range(old.pp_degree)]
        for p, part in enumerate(partition_data(places, pp_degree)):
            final.add_data(p, t, [item for place in part for item in place])
    final.map = {
        final._key(p, t): final.get_data(p, t) for p in range(pp_degree) for t in range(tp_degree)
    }
    if verbose:
        old.print_data("original_2d_map:")
        narrow.print_data("after_tp_reshape:")
        final.print_data("final_2d_map:")
    return final


def get_mpu_ranks(
    tp_size: int = 1, pp_size: int = 1, dp_size: int = 1, virtual_pp_size: int | None = None
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Ranks of the tensor-, pipeline- and data-parallel groups of Megatron's order.

    Args:
        tp_size, pp_size, dp_size: the degrees.
        virtual_pp_size: accepted; virtual stages do not change the groups.
    """
    world = tp_size * pp_size * dp_size
    stage = world // pp_size
    tensor = [list(range(start, start + tp_size)) for start in range(0, world, tp_size)]
    model = [[rank for t in tensor[d::dp_size] for rank in t] for d in range(dp_size)]
    data = [
        list(range(p * stage + t, (p + 1) * stage, tp_size))
        for p in range(pp_size)
        for t in range(tp_size)
    ]
    return tensor, model, data
