# SPDX-License-Identifier: Apache-2.0
"""Hostfile grammar, include and exclude filters, world info."""

from __future__ import annotations

import pytest

from deepspeed.launcher import hostfile, runner

POOL = {"worker-0": 4, "worker-1": 4}
ALL = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "pool"),
    [
        ("worker-0 slots=4\nworker-1 slots=8", {"worker-0": 4, "worker-1": 8}),
        ("# comment\n\n  a slots=1\n # b slots=2\n", {"a": 1}),
        ("a\t slots=3 # three\n", {"a": 3}),
        ("b slots=2\na slots=1", {"b": 2, "a": 1}),
        ("a slots=0", {"a": 0}),
        ("10.0.0.1 slots=16", {"10.0.0.1": 16}),
    ],
)
def test_hostfiles_are_read_in_order(text, pool, tmp_path):
    assert list(hostfile._parse_hostfile(text.splitlines()).items()) == list(pool.items())
    file = tmp_path / "hosts"
    file.write_text(text, encoding="utf-8-sig")
    assert hostfile.fetch_hostfile(str(file)) == pool


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("a slots=1\na slots=2", "multiple entries for a"),
        ("a slots=1\nb", "line 2: b"),
        ("a slots=-1", "bad entry"),
        ("a slots=x", "bad entry"),
        ("a slot=1", "bad entry"),
        ("slots=1", "bad entry"),
    ],
)
def test_bad_hostfiles_are_refused(text, part):
    with pytest.raises(ValueError, match=part):
        hostfile._parse_hostfile(text.splitlines())


def test_a_missing_hostfile_means_this_machine(tmp_path):
    assert hostfile.fetch_hostfile(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize(
    ("include", "selected"),
    [
        ("", {"worker-0": ALL, "worker-1": ALL}),
        ("worker-0", {"worker-0": ALL}),
        ("worker-1@worker-0", {"worker-0": ALL, "worker-1": ALL}),
        ("worker-0@worker-1:0,2", {"worker-0": ALL, "worker-1": [0, 2]}),
        ("worker-1:2,0,2", {"worker-1": [0, 2]}),
        ("worker-0:0@worker-0:1", {"worker-0": [0, 1]}),
    ],
)
def test_include(include, selected):
    found = hostfile.parse_inclusion_exclusion(POOL, include, "")
    assert list(found.items()) == list(selected.items())


@pytest.mark.parametrize(
    ("exclude", "selected"),
    [
        ("worker-0", {"worker-1": ALL}),
        ("worker-0:0,1", {"worker-0": [2, 3], "worker-1": ALL}),
        ("worker-0@worker-1:0,2", {"worker-1": [1, 3]}),
        ("worker-1:0,1,2,3", {"worker-0": ALL}),
        ("worker-0@worker-1", {}),
    ],
)
def test_exclude(exclude, selected):
    found = hostfile.parse_inclusion_exclusion(POOL, "", exclude)
    assert list(found.items()) == list(selected.items())


@pytest.mark.parametrize(
    "text",
    [
        *("jeff", "worker-1:4", "worker-1@", "@", "worker-1:", "worker-0:,", "worker-0:a"),
        *("worker-0:0-2", " worker-0", "worker-0:-1", "localhost", "worker-0:0:1"),
    ],
)
@pytest.mark.parametrize("which", ["include_str", "exclude_str"])
def test_bad_filters_are_refused(text, which):
    hosts = {host: list(range(slots)) for host, slots in POOL.items()}
    with pytest.raises(ValueError, match=r"not found|No slot|bad slot"):
        hostfile.parse_resource_filter(hosts, **{which: text})


def test_include_and_exclude_exclude_each_other():
    with pytest.raises(ValueError, match="mutually exclusive"):
        hostfile.parse_resource_filter({}, include_str="A", exclude_str="B")


def test_a_filter_sees_sparse_slots():
    assert hostfile.parse_resource_filter({"a": [7, 3]}, include_str="a") == {"a": [3, 7]}


def test_world_info_travels_as_one_word():
    world = {"worker-0": [0, 2], "größe": [1]}
    encoded = runner.encode_world_info(world)
    assert set(encoded) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=")
    assert hostfile.decode_world_info(encoded) == world


def test_world_info_is_the_text_that_others_expect():
    assert runner.encode_world_info({"localhost": [0]}) == "eyJsb2NhbGhvc3QiOiBbMF19"


@pytest.mark.parametrize("text", ["", "None", "%%%", "WzEsMl0=", "eyJhIjogMX0=", "ä"])
def test_damaged_world_info_is_refused(text):
    with pytest.raises(ValueError, match="world info"):
        hostfile.decode_world_info(text)


def test_world_info_without_slots_is_refused():
    with pytest.raises(ValueError, match="no slot"):
        hostfile.decode_world_info(hostfile.encode_world_info({"a": []}))
