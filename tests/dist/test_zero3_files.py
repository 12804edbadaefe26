# SPDX-License-Identifier: Apache-2.0
"""Stage 3 on several ranks with parameters and states in files: built there, trained there, and what breaks there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

import deepspeed
from deepspeed.ops.aio.queue import FileQueue
from tests.dist.test_zero3 import NOTHING_STAYS, agree, by_hand, net_of, plain_loss, start, whole
from tests.helpers.launching import launch


def on_disk(folder, **extra):
    nvme = {"device": "nvme", "nvme_path": str(folder)}
    sections = {"offload_param": nvme, "offload_optimizer": nvme, "sub_group_size": 40}
    return {**NOTHING_STAYS, **sections, **extra}


# - built there


def built_on_disk(rank, folder, stays):
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3, **on_disk(folder)}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = net_of()
    params = list(net.parameters())
    in_memory = sum(p.numel() + p.ds_tensor.numel() for p in params)
    files = [p.ds_spill.path.is_file() for p in params]
    with deepspeed.zero.GatheredParameters(params, modifier_rank=0), torch.no_grad():
        for p, q in zip(params, net_of().parameters(), strict=True):
            p.copy_(q)
    engine = start(net, on_disk(folder) if stays else None)
    for step in range(3):
        engine.backward(plain_loss(engine, rank, step))
        engine.step()
    spilled = [p.ds_spill is not None for p in params]
    result = whole(engine)
    engine.destroy()
    return in_memory, files, spilled, result


@pytest.mark.parametrize("stays", [True, False], ids=["stays there", "comes to memory"])
def test_a_model_built_in_files_trains(stays, ranks2, tmp_path):
    want = by_hand(net_of(), 2, 3, plain_loss)
    for in_memory, files, spilled, got in ranks2.run(built_on_disk, str(tmp_path), stays):
        assert in_memory == 0 and all(files)
        assert spilled == [stays] * 6
        agree(got, want)


def built_nowhere(rank):
    said = []
    for remote, section in (("nvme", None), (None, {"device": "nvme"})):
        zero = {"stage": 3} if section is None else {"stage": 3, "offload_param": section}
        try:
            deepspeed.zero.Init(
                remote_device=remote,
                config_dict_or_path={"train_batch_size": 2, "zero_optimization": zero},
            )
        except deepspeed.DeepSpeedConfigError as error:
            said.append(str(error))
    return said


def test_building_in_files_needs_a_folder(ranks2):
    for said in ranks2.run(built_nowhere):
        assert len(said) == 2 and all("nvme_path" in text for text in said)


# - what breaks there


class DyingDisk:
    """Makes the file queues of this process fail: reads, writes, or both, after so many good ones."""

    def __init__(self, what, good):
        self.what, self.good = what, good
        self.submit = {"read": FileQueue.submit_read, "write": FileQueue.submit_write}

    def __enter__(self):
        for kind in self.what:
            setattr(FileQueue, f"submit_{kind}", self.replacement(self.submit[kind]))

    def replacement(self, plain):
        def submit(queue, path, offset, tensor):
            self.good -= 1
            if self.good < 0:
                raise OSError(errno.EIO, "the device does not answer", str(path))
            return plain(queue, path, offset, tensor)

        return submit

    def __exit__(self, *_):
        FileQueue.submit_read, FileQueue.submit_write = self.submit["read"], self.submit["write"]


def one_step(engine, rank, step):
    engine.backward(plain_loss(engine, rank, step))
    engine.step()


def dies_in_a_step(rank, folder, saved, what, good):
    engine = start(net_of(), on_disk(folder))
    one_step(engine, rank, 0)
    engine.save_checkpoint(saved)
    want = whole(engine)
    said = None
    with DyingDisk(what if rank == 1 else (), good):
        try:
            one_step(engine, rank, 1)
        except OSError as error:
            said = str(error)
    engine.destroy()
    again = start(net_of(seed=1), on_disk(folder))
    again.load_checkpoint(saved)
    got = whole(again)
    one_step(again, rank, 1)
    again.destroy()
    return said, want, got


@pytest.mark.parametrize(
    ("what", "good"),
    [(("read",), 0), (("read",), 7), (("write",), 0), (("read",), 17), (("write",), 9)],
    ids=["reads-at-once", "reads-later", "writes-at-once", "reads-much-later", "writes-later"],
)
def test_a_disk_that_dies_in_mid_step_is_an_error_on_all_ranks(what, good, ranks2, tmp_path):
    folder, saved = str(tmp_path / "disk"), str(tmp_path / "saved")
    other, own = ranks2.run(dies_in_a_step, folder, saved, what, good)
    assert "does not answer" in own[0] and "swp" in own[0]
    assert "another rank could not" in other[0]
    for _, want, got in (other, own):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def bad_folder(rank, folder, full):
    path = Path(folder) / "disk"
    said = None
    if rank == 1 and not full:
        path = Path(folder) / "a file"
        path.write_text("not a folder", encoding="utf-8")
    with DyingDisk(("write",) if full and rank == 1 else (), 2):
        try:
            start(net_of(), on_disk(path))
        except OSError as error:
            said = str(error)
    return said, [p.numel() for p in start(net_of()).module.parameters()]


@pytest.mark.parametrize("full", [False, True], ids=["not-a-folder", "full"])
def test_a_folder_that_one_rank_cannot_use_is_an_error_on_all_ranks(full, ranks2, tmp_path):
    (other, first), (own, second) = ranks2.run(bad_folder, str(tmp_path), full)
    assert "another rank could not" in other
    assert ("does not answer" if full else "nvme_path") in own
    assert first == second == [0] * 6  # both ranks can go on


# - a rank that raises while the others wait

RAISES = """
import sys, torch, deepspeed

deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(7, 7), torch.nn.Linear(7, 7)
        self.bad = False

    def forward(self, x):
        x = self.first(x)
        if self.bad and rank == 1:
            raise ValueError("a bad batch on rank 1")
        return self.last(x)


config = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
torch.manual_seed(0)
net = Net()
engine, *_ = deepspeed.initialize(model=net, config=config)
if "load" in sys.argv:
    engine.load_checkpoint("saved")
    sys.stdout.write(f"loaded step {engine.global_steps}\\n")  # in one piece: ranks share the pipe
    sys.stdout.flush()
for step in range(3):
    net.bad = "save" in sys.argv and step == 2
    engine.backward(engine(torch.ones(2, 7)).square().sum())
    engine.step()
    if step == 1 and "save" in sys.argv:
        engine.save_checkpoint("saved")
sys.stdout.write("finished\\n")
"""


def test_a_rank_that_raises_in_forward_ends_the_others_and_the_checkpoint_loads(tmp_path):
    died = launch(tmp_path, "--num_gpus", "2", body=RAISES, args=["save"])
    assert died.returncode != 0 and "a bad batch on rank 1" in died.stdout
    assert "finished" not in died.stdout
    again = launch(tmp_path, "--num_gpus", "2", body=RAISES, args=["load"])
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("loaded step 2") == 2 and again.stdout.count("finished") == 2
