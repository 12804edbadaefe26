# SPDX-License-Identifier: Apache-2.0
"""The integer map from parameters to shards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.runtime.zero.layout import Layout, round_robin_order

sizes = st.lists(st.integers(0, 40), max_size=12)
worlds = st.integers(1, 7)
cuts = st.sampled_from([Layout.contiguous, Layout.per_param])


def shards_of(layout: Layout) -> list[list[int | None]]:
    """Every rank's shard, holding `(param, element)` of what is there and None in padding."""
    shards: list[list] = [[None] * layout.shard_numel for _ in range(layout.world)]
    for rank in range(layout.world):
        for s in layout.segments(rank):
            for k in range(s.length):
                assert shards[rank][s.shard_start + k] is None
                shards[rank][s.shard_start + k] = (s.param, s.param_start + k)
    return shards


@given(sizes, worlds, cuts)
def test_every_element_has_exactly_one_place(numels, world, cut):
    shards = shards_of(cut(numels, world))
    found = sorted(x for shard in shards for x in shard if x is not None)
    assert found == [(p, k) for p, n in enumerate(numels) for k in range(n)]


@given(sizes, worlds, cuts)
def test_param_segments_are_the_same_map_read_by_param(numels, world, cut):
    layout = cut(numels, world)
    by_rank = sorted(
        (s for r in range(world) for s in layout.segments(r)),
        key=lambda s: (s.param, s.param_start),
    )
    by_param = [s for p in range(len(numels)) for s in layout.param_segments(p)]
    assert by_rank == by_param


@given(sizes, worlds, worlds, cuts, cuts)
def test_copies_turn_any_layout_into_any_other(numels, world, new_world, cut, new_cut):
    old, new = cut(numels, world), new_cut(numels, new_world)
    source = shards_of(old)
    made: list[list] = [[None] * new.shard_numel for _ in range(new_world)]
    for c in old.copies_to(new):
        made[c.dst_rank][c.dst_start : c.dst_start + c.length] = source[c.src_rank][
            c.src_start : c.src_start + c.length
        ]
    assert made == shards_of(new)


@given(sizes, worlds)
def test_reshard_there_and_back_is_the_identity_of_places(numels, world):
    layout = Layout.contiguous(numels, 3)
    assert sum(c.length for c in layout.reshard(world)) == layout.numel


@given(sizes, worlds)
def test_contiguous_is_padded_to_twice_the_world_and_pads_at_the_end(numels, world):
    layout = Layout.contiguous(numels, world)
    assert layout.padded_numel % (2 * world) == 0
    assert layout.padded_numel - layout.numel < 2 * world
    flat = [x for shard in shards_of(layout) for x in shard]
    assert all(x is not None for x in flat[: layout.numel])
    assert sum(layout.padding(r) for r in range(world)) == layout.padded_numel - layout.numel


@given(sizes, worlds)
def test_per_param_shards_hold_ceil_of_each_param(numels, world):
    assert Layout.per_param(numels, world).shard_numel == sum(-(-n // world) for n in numels)


@given(sizes, st.integers(0, 300), st.integers(0, 300))
def test_params_between_finds_whoever_touches_the_range(numels, start, length):
    layout = Layout.contiguous(numels, 1)
    end = min(start + length, layout.numel)
    inside = layout.params_between(start, end)
    for p, n in enumerate(numels):
        touches = max(start, layout.starts[p]) < min(end, layout.starts[p] + n)
        assert not touches or p in inside


def test_round_robin_gives_neighbours_to_different_ranks():
    assert round_robin_order(7, 3) == [0, 3, 6, 1, 4, 2, 5]
    assert round_robin_order(2, 4) == [0, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: Layout.contiguous([1], 0),
        lambda: Layout.per_param([-1], 2),
        lambda: Layout.contiguous([1], 1, 0),
    ],
)
def test_impossible_layouts_are_refused(call):
    with pytest.raises(ValueError, match="at least 1|negative"):
        call()


def test_layouts_of_different_params_do_not_mix():
    with pytest.raises(ValueError, match="different parameters"):
        list(Layout.contiguous([3], 1).copies_to(Layout.contiguous([4], 1)))
