# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded parameters: resume bit for bit, to and from other stages and numbers of ranks, whole weights."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import deepspeed
from deepspeed.checkpoint.reader import Folder
from deepspeed.checkpoint.weights import SavedWeight
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.dist.test_zero3 import NOTHING_STAYS, net_of, x_of


def start(stage, dtype, net=None, **zero):
    config = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 12 // torch.distributed.get_world_size(),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, **(NOTHING_STAYS if stage == 3 else {}), **zero},
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    return deepspeed.initialize(model=net_of(7) if net is None else net, config=config)[0]


def steps(engine, first, last):
    losses = []
    for step in range(first, last):
        x = x_of(0, step).to(
            next(iter(engine.param_names)).dtype
        )  # the same on all ranks: any number of them agrees
        loss = engine(x).float().square().sum()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def save(rank, folder, stage, dtype, zero):
    engine = start(stage, dtype, **zero)
    steps(engine, 0, 3)
    engine.save_checkpoint(folder, client_state={"note": "hello"})
    return steps(engine, 3, 6)


def resume(rank, folder, stage, dtype, zero):
    engine = start(stage, dtype, net_of(8 + rank), **zero)
    path, client = engine.load_checkpoint(folder)
    assert path is not None and client["note"] == "hello" and engine.global_steps == 3
    return steps(engine, 3, 6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("old", "new"), [(3, 3), (3, 2), (2, 3), (3, 1)])
def test_training_resumes_at_another_stage_as_if_nothing_had_been(
    old, new, dtype, ranks2, tmp_path
):
    want = ranks2.run(save, tmp_path, old, dtype, {})
    got = ranks2.run(resume, tmp_path, new, dtype, {})
    assert got == want
    files = {p.name for p in (tmp_path / "global_step3").iterdir()}
    if old == 3:
        assert {f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in (0, 1)} <= files


def frozen_net(seed):
    net = net_of(seed)
    next(net.parameters()).requires_grad_(False)
    return net


def save_frozen(rank, folder):
    net = frozen_net(7)
    engine = start(3, "bf16", net)
    steps(engine, 0, 2)
    engine.save_checkpoint(folder)
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        return [p.detach().float().clone() for p in net.parameters()]


def resume_watched(rank, folder):
    """Load; return the weights, the files that this rank opened and the most elements that it read of one weight."""
    net = frozen_net(8 + rank)
    engine = start(3, "bf16", net)
    opened, most = set(), 0
    plain_load, plain_elements = Folder.load, SavedWeight.elements

    def load(self, name, *args, **options):
        opened.add(name)
        return plain_load(self, name, *args, **options)

    def elements(self, start, length, dtype):
        nonlocal most
        most = max(most, length / max(self.shape.numel(), 2))
        return plain_elements(self, start, length, dtype)

    with (
        mock.patch.object(Folder, "load", load),
        mock.patch.object(SavedWeight, "elements", elements),
        mock.patch.object(SavedWeight, "whole", None),
    ):
        engine.load_checkpoint(folder)
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        return [p.detach().float().clone() for p in net.parameters()], opened, most


def test_a_rank_reads_its_own_slices_alone(ranks2, tmp_path):
    want = ranks2.run(save_frozen, tmp_path)[0]
    for rank, (got, opened, most) in enumerate(ranks2.run(resume_watched, tmp_path)):
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs)
        other = f"zero_pp_rank_{1 - rank}_mp_rank_00"
        assert not any("optim_states" in name and other in name for name in opened)
        assert most <= 2 / 3  # of a weight of three elements one rank keeps two


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_resumes_on_another_number_of_ranks(dtype, ranks2, ranks3, tmp_path):
    want = ranks2.run(save, tmp_path, 3, dtype, {})[0]
    for got in ranks3.run(resume, tmp_path, 3, dtype, {}):
        # A mean over three equal gradients is one rounding away from a mean over two.
        assert got == pytest.approx(want, rel=1e-4 if dtype == "fp32" else 2e-2)


def test_states_in_files_are_saved_and_resumed(ranks2, tmp_path):
    nvme = {
        "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path / "swap")},
        "offload_param": {"device": "nvme", "nvme_path": str(tmp_path / "swap")},
        "sub_group_size": 50,
    }
    want = ranks2.run(save, tmp_path / "saved", 3, "bf16", nvme)
    assert ranks2.run(resume, tmp_path / "saved", 3, "bf16", nvme) == want
    assert ranks2.run(resume, tmp_path / "saved", 3, "bf16", {}) == want


def whole_weights(rank, folder):
    net = net_of(7)
    net[2].requires_grad_(False)
    engine = start(3, "bf16", net, stage3_gather_16bit_weights_on_model_save=True)
    steps(engine, 0, 2)
    engine.save_checkpoint(folder)
    saved = engine.save_16bit_model(folder, "weights.bin")
    state = engine._zero3_consolidated_16bit_state_dict()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        live = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return saved, state, live


def test_whole_weights_come_out_of_slices(ranks2, tmp_path):
    (saved, state, live), (also, nothing, _) = ranks2.run(whole_weights, tmp_path)
    assert saved and also and nothing is None
    file = torch.load(tmp_path / "weights.bin", weights_only=True)
    masters = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    for name, value in live.items():
        assert torch.equal(state[name], value) and torch.equal(file[name], value)
        assert torch.equal(masters[name].bfloat16(), value)


def refused(rank, folder):
    return start(3, "bf16").save_16bit_model(folder)


def test_whole_weights_are_written_only_if_asked_for(ranks2, tmp_path):
    assert ranks2.run(refused, tmp_path) == [False, False]
    assert not list(tmp_path.iterdir())


class OnFrozen(torch.nn.Module):
    """An adapter between frozen layers that share their weight."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(7, 7)
        self.last = torch.nn.Linear(7, 7)
        self.last.weight = self.first.weight
        self.requires_grad_(False)
        torch.manual_seed(seed)
        self.adapter = torch.nn.Linear(7, 7)

    def forward(self, x):
        return self.last(self.adapter(self.first(x)))


def save_adapter(rank, folder, stage):
    engine = start(stage, "fp32", OnFrozen(1))
    steps(engine, 0, 2)
    engine.save_checkpoint(folder, tag="t", exclude_frozen_parameters=True)
    return steps(engine, 2, 4)


def load_adapter(rank, folder, stage):
    engine = start(stage, "fp32", OnFrozen(2))
    engine.load_checkpoint(folder, load_module_strict=False)
    return steps(engine, 2, 4)


@pytest.mark.parametrize(("old", "new"), [(3, 3), (3, 2), (2, 3)])
def test_a_checkpoint_without_frozen_weights_resumes_beside_them(old, new, ranks2, tmp_path):
    want = ranks2.run(save_adapter, tmp_path, old)
    assert ranks2.run(load_adapter, tmp_path, new) == want
    weights = get_fp32_state_dict_from_zero_checkpoint(tmp_path, exclude_frozen_parameters=True)
    assert sorted(weights) == ["adapter.bias", "adapter.weight"]
    assert all(value.numel() for value in weights.values())
