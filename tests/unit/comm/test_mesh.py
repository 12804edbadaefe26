# SPDX-License-Identifier: Apache-2.0
"""The grid of ranks, as integers: no process takes part."""

from __future__ import annotations

import itertools

import pytest

from deepspeed.comm.mesh import Axis, Mesh, expert_grid, grid
from deepspeed.utils.errors import DeepSpeedCommError


def place(rank, pipe, data, sequence, tensor):
    """The rank's coordinates by plain division: the definition in the module's docstring."""
    rest, t = divmod(rank, tensor)
    rest, s = divmod(rest, sequence)
    p, d = divmod(rest, data)
    return {"pipe": p, "data": d, "sequence": s, "tensor": t}


SIZES = [
    (8, 1, 1, 1),
    (8, 2, 2, 2),
    (12, 3, 1, 2),
    (16, 1, 4, 2),
    (6, 1, 1, 6),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize(("world", "sequence", "tensor", "pipe"), SIZES)
def test_each_group_varies_its_own_coordinates_only(world, sequence, tensor, pipe):
    data = world // (sequence * tensor * pipe)
    axes = grid(world, sequence=sequence, tensor=tensor, pipe=pipe)
    for name, groups in axes.items():
        free = {"sequence_data": {"sequence", "data"}}.get(name, {name})
        assert sorted(itertools.chain(*groups)) == list(range(world))
        for ranks in groups:
            places = [place(rank, pipe, data, sequence, tensor) for rank in ranks]
            fixed = [{k: v for k, v in p.items() if k not in free} for p in places]
            assert all(one == fixed[0] for one in fixed)
            assert list(ranks) == sorted(ranks)


def test_tensor_neighbours_are_adjacent_ranks():
    assert grid(8, tensor=2, pipe=2)["tensor"][0] == (0, 1)
    assert grid(8, tensor=2, pipe=2)["data"][0] == (0, 2)
    assert grid(8, tensor=2, pipe=2)["pipe"][0] == (0, 4)


@pytest.mark.parametrize("sizes", [{"tensor": 3}, {"sequence": 0}, {"pipe": 16}])
def test_sizes_that_do_not_divide_the_ranks_are_refused(sizes):
    with pytest.raises(DeepSpeedCommError, match="do not divide"):
        grid(8, **sizes)


def test_expert_groups_are_neighbours_and_their_copies_lie_across():
    within, across = expert_grid([tuple(range(8))], 4)
    assert within == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert across == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_expert_size_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(DeepSpeedCommError, match="ep_size=3"):
        expert_grid([(0, 1, 2, 3)], 3)


def test_one_process_is_alone_on_every_axis():
    mesh = Mesh.build(1, 0, expert=(1,))
    assert mesh.world == mesh.data == mesh.tensor == mesh.expert["ep_size_1"] == Axis.alone()


def test_groups_of_several_processes_need_torch_distributed():
    with pytest.raises(DeepSpeedCommError, match="init_distributed"):
        Mesh.build(2, 0)
