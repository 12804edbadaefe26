# SPDX-License-Identifier: Apache-2.0
"""Core lists and how ranks share them."""

from __future__ import annotations

import pytest

from deepspeed.utils import numa


@pytest.fixture(autouse=True)
def _one_node_of_eight(monkeypatch):
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    monkeypatch.setattr(numa, "get_numa_cores", lambda: [list(range(8))])
    monkeypatch.setattr(numa, "available_cores", lambda: list(range(8)))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("3", [3]), ("0-3,5", [0, 1, 2, 3, 5]), ("7-7", [7]), ("0-1, 4-5", [0, 1, 4, 5])],
)
def test_ranges_are_read(text, numbers):
    assert numa.parse_range_list(text) == numbers
    assert numa.parse_range_list(numa.format_range_list(numbers)) == numbers


@pytest.mark.parametrize("text", ["", "a", "3-0", "0-3,2", "1,0", "0,,1", "-1", "0-", "1-2-3"])
def test_bad_ranges_are_refused(text):
    with pytest.raises(ValueError, match="bad (range|list) of cores"):
        numa.parse_range_list(text)


@pytest.mark.parametrize(
    ("words", "count", "command"),
    [
        ((None, 2, 0), 4, ["numactl", "-C", "0-3"]),
        ((None, 2, 1), 4, ["numactl", "-C", "4-7"]),
        ((None, 3, 2), 2, ["numactl", "-C", "4-5"]),
        (("0-1", 1, 0), 2, ["numactl", "-C", "0-1"]),
        (("0,2,4,6", 2, 1), 2, ["numactl", "-C", "4,6"]),
        (("0-9", 2, 1), 5, ["numactl", "-C", "5-9"]),
    ],
)
def test_each_rank_gets_an_even_share(words, count, command):
    assert numa.get_numactl_cmd(*words) == (count, command)


def test_memory_is_bound_to_the_nodes_of_the_cores(monkeypatch):
    monkeypatch.setattr(numa, "get_numa_cores", lambda: [[0, 1, 4, 5], [2, 3, 6, 7]])
    assert numa.get_numactl_cmd("0-1,4-5", 1, 0)[1] == ["numactl", "-C", "0-1,4-5", "-m", "0"]
    assert numa.get_numactl_cmd(None, 2, 1)[1] == ["numactl", "-C", "4-7", "-m", "0,1"]


def test_more_ranks_than_cores_are_refused():
    with pytest.raises(AssertionError, match="At least one core"):
        numa.get_numactl_cmd("0", 2, 0)


def test_a_second_way_of_pinning_is_refused(monkeypatch):
    monkeypatch.setenv("KMP_AFFINITY", "granularity=fine,compact")
    with pytest.raises(ValueError, match="KMP_AFFINITY"):
        numa.get_numactl_cmd(None, 1, 0)
    monkeypatch.setenv("KMP_AFFINITY", "disabled")
    assert numa.get_numactl_cmd(None, 1, 0)[0] == 8


def test_this_machine_has_nodes_with_cores(monkeypatch):
    monkeypatch.undo()
    nodes = numa.get_numa_cores()
    assert nodes
    assert all(nodes)
    assert len(set().union(*nodes)) == sum(map(len, nodes))
