# SPDX-License-Identifier: Apache-2.0
"""Leaf modules: found by type, class name, module name and suffix, and by the configuration."""

from __future__ import annotations

import logging

import pytest
from torch import nn

from deepspeed import utils
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(2, 2)


class Special(Expert):
    pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Expert()
        self.rest = nn.ModuleList([Special(), nn.Linear(2, 2)])


def test_types_match_their_subclasses_and_names_do_not():
    net = Net()
    assert utils.set_z3_leaf_modules(net, [Expert]) == [net.first, net.rest[0]]
    assert net.first._z3_leaf is True and utils.z3_leaf_module(net.rest[0])
    assert not utils.z3_leaf_module(net)
    assert utils.get_z3_leaf_modules(net) == [net.first, net.rest[0]]
    assert utils.unset_z3_leaf_modules(net, ["Special"]) == [net.rest[0]]
    assert utils.get_z3_leaf_modules(net) == [net.first]
    assert utils.set_z3_leaf_modules(net, [f"{__name__}.Special"]) == [net.rest[0]]


def test_one_module_by_hand():
    net = Net()
    utils.set_z3_leaf_module(net.first, True)
    assert utils.get_z3_leaf_modules(net) == [net.first]
    utils.set_z3_leaf_module(net.first, False)
    assert utils.get_z3_leaf_modules(net) == []


def test_names_and_suffixes_tell_what_was_not_found():
    net = Net()
    assert utils.set_z3_leaf_modules_by_name(net, ["first", "rest.1", "none"]) == (
        [net.first, net.rest[1]],
        ["none"],
    )
    assert utils.set_z3_leaf_modules_by_suffix(net, [".up", "none"]) == (
        [net.first.up, net.rest[0].up],
        ["none"],
    )
    assert utils.set_z3_leaf_modules_by_name(net, ["first"], flag=False) == ([net.first], [])
    assert not utils.z3_leaf_module(net.first)


@pytest.mark.parametrize(
    ("call", "wanted", "words"),
    [
        (utils.set_z3_leaf_modules, ["Nope"], r"No modules of type \['Nope'\].*Expert"),
        (utils.unset_z3_leaf_modules, [nn.Conv2d], "No modules of type"),
        (utils.set_z3_leaf_modules_by_name, ["nope"], r"No modules named \['nope'\].*first"),
        (utils.set_z3_leaf_modules_by_suffix, ["nope"], "No modules matching suffixes"),
    ],
)
def test_finding_nothing_is_an_error_unless_told_otherwise(call, wanted, words):
    net = Net()
    with pytest.raises(ValueError, match=words):
        call(net, wanted)
    quiet = call(net, wanted, raise_if_not_found=False)
    assert quiet in ([], ([], wanted))


def test_what_is_no_class_is_refused():
    with pytest.raises(AssertionError, match="types or names"):
        utils.set_z3_leaf_modules(Net(), [3])


def test_param_of_a_leaf_is_known_by_its_mark():
    net = Net()
    assert not utils.z3_leaf_parameter(net.first.up.weight)
    net.first.up.weight.ds_z3_leaf_module = net.first
    assert utils.z3_leaf_parameter(net.first.up.weight)


@pytest.mark.parametrize(
    ("section", "found", "said"),
    [
        ({}, [], []),
        ({"classes": "Special"}, ["rest.0"], []),
        ({"classes": ["Nope"]}, [], ["matches no module"]),
        (
            {"names": ["first", "zz"], "name_suffixes": ["1", "yy"]},
            ["first", "rest.1"],
            ["['zz']", "['yy']"],
        ),
        ({"classes": ["Expert"], "names": ["first"]}, ["first"], []),
    ],
)
def test_section_of_the_configuration(section, found, said, caplog):
    net = Net()
    config = DeepSpeedZeroConfig(stage=3, leaf_module=section).leaf_module
    with caplog.at_level(logging.WARNING, logger="DeepSpeed"):
        got = apply_zero_leaf_module_config(net, config)
    assert got == [net.get_submodule(name) for name in found]
    assert len(caplog.messages) == len(said)
    assert all(words in text for words, text in zip(said, caplog.messages, strict=True))


def test_no_section_finds_nothing():
    assert apply_zero_leaf_module_config(Net(), None) == []
