# SPDX-License-Identifier: Apache-2.0
"""Megatron checkpoints: parts that are joined and split again, against cuts that are made by hand."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.runtime.state_dict_factory import SDLoaderFactory
from deepspeed.utils.logging import logger

HIDDEN = 8
# where each weight is cut; None for those that all ranks have
CUTS = {
    "word_embeddings.weight": (16, HIDDEN, 0),
    "layers.0.attention.query_key_value.weight": (3 * HIDDEN, HIDDEN, "qkv"),
    "layers.0.attention.query_key_value.bias": (3 * HIDDEN, 1, "qkv"),
    "layers.0.attention.dense.weight": (HIDDEN, HIDDEN, 1),
    "layers.0.attention.dense.bias": (HIDDEN, 1, None),
    "layers.0.mlp.dense_h_to_4h.weight": (4 * HIDDEN, HIDDEN, 0),
    "layers.0.mlp.dense_h_to_4h.bias": (4 * HIDDEN, 1, 0),
    "layers.0.mlp.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN, 1),
    "norm.weight": (HIDDEN, 1, None),
}


def whole():
    torch.manual_seed(0)
    return {name: torch.randn(rows, columns) for name, (rows, columns, _) in CUTS.items()}


def part(state, ranks, rank, version):
    found = {}
    for name, value in state.items():
        cut = CUTS[name][2]
        if cut == "qkv":
            pieces = value.chunk(3) if version == 0 else (value,)
            found[name] = torch.cat([piece.chunk(ranks)[rank] for piece in pieces])
        else:
            found[name] = value if cut is None else value.chunk(ranks, cut)[rank]
    return found


def save(folder, ranks, version, key="model"):
    names = []
    for rank in range(ranks):
        module = part(whole(), ranks, rank, version)
        said = {"checkpoint_version": version, "mp_world_size": ranks, "iteration": 7}
        names.append(str(folder / f"rank_{rank}.pt"))
        torch.save({**said, key: module} if key else module, names[-1])
    return names


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) for k in found
    )


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
@pytest.mark.parametrize(("wrote", "reads"), [(4, 1), (4, 2), (2, 2), (1, 4), (2, 4)])
def test_each_rank_gets_its_part_whoever_wrote_them(tmp_path, version, wrote, reads):
    names = save(tmp_path, wrote, version, "module")
    described = {"type": "Megatron", "checkpoints": names, "version": version}
    for rank in range(reads):
        loader = SDLoaderFactory.get_sd_loader_json(described, None)
        path, state, (scales, joined) = loader.load(reads, rank)
        assert same(state["module"], part(whole(), reads, rank, version))
        assert state["iteration"] == 7 and scales is None and joined == max(1, wrote // reads)
        assert path == names[rank * wrote // reads]


@pytest.mark.parametrize("reads", [1, 2, 4])
def test_rounded_weights_have_their_scales(tmp_path, reads):
    loader = SDLoaderFactory.get_sd_loader(save(tmp_path, 2, 0), None)
    for rank in range(reads):
        _, state, (scales, _) = loader.load(reads, rank, quantize=True, quantize_groups=4)
        qkv = state["model"]["layers.0.attention.query_key_value.weight"]
        expected = part(whole(), reads, rank, 0)["layers.0.attention.query_key_value.weight"]
        assert qkv.dtype == torch.int8
        if reads == 1:  # eight groups of consecutive values
            values = (qkv.float().reshape(8, -1) * scales[0, 0][:8, None]).view_as(expected)
            # values to 4.5 in 256 steps
            torch.testing.assert_close(values, expected, rtol=0, atol=0.04)


def test_what_cannot_be_read_is_named(tmp_path):
    names = save(tmp_path, 4, 3)
    with pytest.raises(AssertionError, match="version: 3 is not supported"):
        SDLoaderFactory.get_sd_loader(names, None).load(2, 0)
    with pytest.raises(AssertionError, match="got 3 files, expected 4"):
        SDLoaderFactory.get_sd_loader(names[:3], None)
    with pytest.raises(AssertionError, match="4 and 3"):
        SDLoaderFactory.get_sd_loader(names, None).load(3, 0)
    with pytest.raises(AssertionError, match="attention.dense.weight is not found"):
        SDLoaderFactory.get_sd_loader(names, None).load(2, 0, module_key=None)
    with pytest.raises(AssertionError, match="neither 'model' or 'module'"):
        loader = SDLoaderFactory.get_sd_loader(save(tmp_path, 2, 0, key=None), None)
        loader.load(1, 0)
    with pytest.raises(AssertionError, match="other checkpoint type"):
        SDLoaderFactory.get_sd_loader_json({"type": "other", "checkpoints": names}, None)
    with pytest.raises(AssertionError, match="no such rank: got -1"):
        SDLoaderFactory.get_sd_loader(names, None).load(2, -1)
    names = save(tmp_path, 2, 0)
    more = torch.load(names[1], weights_only=True)
    more["model"]["of.one.rank"] = torch.zeros(1)
    torch.save(more, names[1])
    with pytest.raises(AssertionError, match="different weights: got of.one.rank"):
        SDLoaderFactory.get_sd_loader(names, None).load(1, 0)


def test_values_that_differ_and_should_not_are_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    names = save(tmp_path, 2, 0)
    content = torch.load(names[1], weights_only=True)
    content["model"]["norm.weight"] += 1
    torch.save(content, names[1])
    with caplog.at_level(logging.WARNING):
        SDLoaderFactory.get_sd_loader(names, None).load(1, 0)
    assert "norm.weight" in caplog.text and "dense.bias" not in caplog.text


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (rows, columns, _) in CUTS.items():
            *path, last = name.split(".")
            owner = self
            for step in path:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = getattr(owner, step)
            owner.register_parameter(last, nn.Parameter(torch.empty(rows, columns)))


@pytest.mark.parametrize("key", ["model", None])
def test_inference_joins_the_parts(tmp_path, key):
    names = [Path(name).name for name in save(tmp_path, 2, 0, key)]
    described = {"type": "Megatron", "checkpoints": names, "version": 0, "base_dir": str(tmp_path)}
    with torch.device("meta"):
        net = Tiny()
    engine = deepspeed.init_inference(
        net, dtype=torch.float32, checkpoint=described, training_mp_size=2
    )
    assert same(dict(engine.module.state_dict()), whole())
